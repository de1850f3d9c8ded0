"""A check that a run which is resumed or evaluated finds the documents that it was trained on."""

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from .errors import CorpusError

if TYPE_CHECKING:
    from .module import DataModule

log = logging.getLogger(__name__)


def check_unchanged(data: "DataModule", state: Mapping[str, Any], run: str) -> None:
    """Raises CorpusError unless the corpus is the one that `run` was trained on.

    data: set up. state: its `state_dict` in the checkpoint of `run`. Older checkpoints have no `contents`: then only
    the training split is checked, by `stream`, and a warning names the splits that are not checked.
    """
    key = f"data.path={'null' if data.path is None else data.path}"
    if data.streams and "shards" in state:
        shards = [shard.identity for shard in data.streams.streams.shards]
        stored, found = ({name: about for name, *about in listed} for listed in (state["shards"], shards))
        changed = sorted(name for name in stored.keys() | found.keys() if stored.get(name) != found.get(name))
        if changed:
            old, new = (_about(*files.get(changed[0], [None, None])) for files in (stored, found))
            raise CorpusError(
                f"{key}: must hold the files that {run} was trained with; {len(changed)} changed, {changed[0]} among"
                f" them ({old} then, {new} now)"
            )
    if "contents" in state:
        stored, found = state["contents"], data.corpus.contents
        changed = [name for name in stored if found.get(name) != stored[name]]
        if changed:
            old, new = (contents.get(changed[0], "none")[:12] for contents in (stored, found))
            raise CorpusError(
                f"{key}: must hold the documents that {run} was trained with; its {' and '.join(changed)} split"
                f" changed (fingerprint of {changed[0]}: {old} then, {new} now)"
            )
    elif "stream" in state:
        if state["stream"] != data.state_dict()["stream"]:
            raise CorpusError(
                f"{key}: must hold the documents that {run} was trained with; its train split, or the tokenizer"
                " that was learned from it, changed"
            )
        log.warning(f"{run} stores no fingerprint of its validation and test split: taken as they are now")
    else:
        log.warning(f"{run} stores no fingerprint of its corpus: {key} is taken as it is now")


def _about(size: int | None, content: str | None) -> str:
    """Returns the size of a file, and the first digits of the hub's hash of its content; `missing` without a size."""
    if size is None:
        return "missing"
    return f"{size:,} bytes" + (f", {content[:12]}" if content else "")

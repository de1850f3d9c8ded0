"""A check that a run which is resumed or evaluated finds the documents that it was trained on."""

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .errors import CorpusError
from .sources.base import Paths

log = logging.getLogger(__name__)


def check_unchanged(
    run: str,
    state: Mapping[str, Any],
    path: Paths,
    contents: Mapping[str, str],
    shards: Sequence[Sequence[Any]] | None,
    order_number: Callable[[], int],
) -> None:
    """Raises CorpusError unless the documents are those that `run` was trained on.

    Older checkpoints have no `contents`: then only the training split is checked, by `stream`, and a warning names the
    splits that are not checked.

    Args:
        run: names it in messages.
        state: the data module's `state_dict` in its checkpoint.
        path, contents: of the corpus as it is now (`Corpus.contents`).
        shards: (name, size, hash) of the files as they are now, if training streams them.
        order_number: computes the `stream` of the state as it is now.
    """
    key = f"data.path={'null' if path is None else path}"
    if shards is not None and "shards" in state:
        stored, found = ({name: about for name, *about in listed} for listed in (state["shards"], shards))
        changed = sorted(name for name in stored.keys() | found.keys() if stored.get(name) != found.get(name))
        if changed:
            old, new = (_about(*files.get(changed[0], [None, None])) for files in (stored, found))
            raise CorpusError(
                f"{key}: must hold the files that {run} was trained with; {len(changed)} changed, {changed[0]} among"
                f" them ({old} then, {new} now)"
            )
    if "contents" in state:
        stored, found = state["contents"], contents
        changed = [name for name in stored if found.get(name) != stored[name]]
        if changed:
            old, new = (each.get(changed[0], "none")[:12] for each in (stored, found))
            raise CorpusError(
                f"{key}: must hold the documents that {run} was trained with; its {' and '.join(changed)} split"
                f" changed (fingerprint of {changed[0]}: {old} then, {new} now)"
            )
    elif "stream" in state:
        if state["stream"] != order_number():
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

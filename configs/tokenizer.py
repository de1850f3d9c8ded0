"""The tokenizer of a run: a resumed run keeps its own, and a run that starts from its weights uses the same one."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from configs.errors import ConfigError
from configs.pretrained import is_pretrained, pretrained_folder

FILE = "tokenizer.json"
"""The file of a run's tokenizer in its folder."""

BY_NAME = ("data/tokenizer", "data.tokenizer", "data.tokenizer._target_")
"""Overrides that choose a tokenizer. Other overrides below `data.tokenizer` change its settings."""


def as_resumed(config: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Returns the config of a resumed run in `folder`: with its own tokenizer, and without `init_from`."""
    return {**config, "init_from": None, "data": with_own_tokenizer(config["data"], folder)}


def with_own_tokenizer(data: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Returns the `data` group of the run in `folder` with the tokenizer.json of that folder. Folders of early versions
    have none; the group's settings then stay."""
    file = folder / FILE
    return {**data, **({"tokenizer": _saved(file)} if file.is_file() else {})}


def inherit_tokenizer(config: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Returns a composed training config. Under `init_from` it has the checkpoint's tokenizer, unless `overrides` (of
    the command line) choose another by name.

    Raises:
        ConfigError: the overrides give a vocabulary that the checkpoint's tokenizer does not have, or the checkpoint
            has no tokenizer.json and they choose no tokenizer.
    """
    start = config["init_from"]
    given = dict(override.lstrip("+~").partition("=")[::2] for override in overrides)
    if not start or any(key in given for key in BY_NAME):
        return dict(config)
    file = tokenizer_of(start)
    choices = "data/tokenizer=bpe, bytes, or saved with data.tokenizer.path=..."
    if not file.is_file() and (is_pretrained(start) or Path(start).exists()):
        raise ConfigError(
            f"init_from={start}: must have a {FILE} ({file} is missing), or a tokenizer chosen by name: {choices}"
        )
    vocabulary = given.get("data.tokenizer.vocabulary")
    if vocabulary is not None and file.is_file() and vocabulary not in map(str, _vocabularies(file)):
        raise ConfigError(
            f"data.tokenizer.vocabulary={vocabulary}: must be left out, for init_from={start} gives its tokenizer;"
            f" another is chosen by name: {choices}"
        )
    return {**config, "data": {**config["data"], "tokenizer": _saved(file)}}


def tokenizer_of(checkpoint: str | Path) -> Path:
    """Returns the path of a run's tokenizer.json, from the path of its folder or of a checkpoint, or from `hf:NAME`."""
    if is_pretrained(checkpoint):
        return pretrained_folder(str(checkpoint)) / FILE
    path = Path(checkpoint)
    if path.suffix == ".ckpt":
        path = path.parent.parent if path.parent.name == "checkpoints" else path.parent
    elif path.name in ("last", "best"):
        path = path.parent
    return path / FILE


def _vocabularies(file: Path) -> set[int]:
    """Vocabulary sizes that describe a tokenizer: its own, and the one in its run's config."""
    from data.tokenizers import load

    config = file.with_name("config.yaml")
    settings = yaml.safe_load(config.read_text(encoding="utf-8"))["data"]["tokenizer"] if config.is_file() else {}
    return {load(file).vocabulary, settings.get("vocabulary")}


def _saved(file: Path) -> dict[str, str]:
    """Returns the `data.tokenizer` settings of a tokenizer.json, as in configs/data/tokenizer/saved.yaml."""
    return {"_target_": "data.tokenizers.Saved", "path": str(file)}

"""Which tokenizer a run gets: a run that exists keeps its own, and a run that starts from its weights takes it over."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from configs.build import ConfigError

FILE = "tokenizer.json"
"""Of a run's folder."""

BY_NAME = ("data/tokenizer", "data.tokenizer", "data.tokenizer._target_")
"""Overrides that choose a tokenizer; others below `data.tokenizer` set one that is chosen."""


def as_resumed(config: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """The config of the run in `folder` that goes on: with its own tokenizer, and without `init_from`, which it has
    behind it."""
    return {**config, "init_from": None, "data": with_own_tokenizer(config["data"], folder)}


def with_own_tokenizer(data: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """The `data` group of the run in `folder`, with the tokenizer.json there in the place of the settings that made it.
    Older folders hold none: their settings stay."""
    file = folder / FILE
    return {**data, **({"tokenizer": _saved(file)} if file.is_file() else {})}


def inherit_tokenizer(config: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """A composed training config; under `init_from` with the checkpoint's tokenizer, unless `overrides` (the command
    line's) choose one by name.

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
    if not file.is_file() and Path(start).exists():
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
    """Where the tokenizer.json of a run lies, by the name of its folder or of a checkpoint alone."""
    path = Path(checkpoint)
    if path.suffix == ".ckpt":
        path = path.parent.parent if path.parent.name == "checkpoints" else path.parent
    elif path.name in ("last", "best"):
        path = path.parent
    return path / FILE


def _vocabularies(file: Path) -> set[int]:
    """The sizes by which a tokenizer may be called: its own, and the one that its run asked for."""
    from data.tokenizers import load

    config = file.with_name("config.yaml")
    settings = yaml.safe_load(config.read_text(encoding="utf-8"))["data"]["tokenizer"] if config.is_file() else {}
    return {load(file).vocabulary, settings.get("vocabulary")}


def _saved(file: Path) -> dict[str, str]:
    """The `data.tokenizer` settings of a tokenizer.json, as in configs/data/tokenizer/saved.yaml."""
    return {"_target_": "data.tokenizers.Saved", "path": str(file)}

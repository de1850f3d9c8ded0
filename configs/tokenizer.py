"""The tokenizer of a run: a resumed run keeps its own, and a run that starts from its weights uses the same one."""

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf

from configs.errors import ConfigError
from configs.pretrained import is_pretrained, pretrained_folder

FILE = "tokenizer.json"
"""The file of a run's tokenizer in its folder."""

BY_NAME = ("data/tokenizer", "data.tokenizer", "data.tokenizer._target_")
"""Overrides that choose a tokenizer."""

SETTING = "data.tokenizer."
"""The prefix of keys that set a tokenizer's settings."""


def as_resumed(config: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Returns the config of a resumed run in `folder`: with its own tokenizer, and without `init_from`."""
    return {**config, "init_from": None, "data": with_own_tokenizer(config["data"], folder)}


def with_own_tokenizer(data: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Returns the `data` group of the run in `folder` with the tokenizer.json of that folder. Folders of early versions
    have none; the group's settings then stay."""
    file = folder / FILE
    return {**data, **({"tokenizer": _saved(file)} if file.is_file() else {})}


def inherits_tokenizer(config: Mapping[str, Any], overrides: Sequence[str]) -> bool:
    """Whether a composed training config takes the tokenizer of the checkpoint in `init_from`. It does not if
    `overrides` (of the command line) choose another tokenizer by name."""
    return bool(config.get("init_from")) and not any(key in _keys(overrides) for key in BY_NAME)


def complete(config: DictConfig, overrides: Sequence[str]) -> dict[str, Any]:
    """Returns a composed training config as plain values, with all interpolations resolved. Settings of a tokenizer
    that the checkpoint of `init_from` replaces need no value.

    Raises:
        MissingMandatoryValue: a key that must be set is not.
    """
    if inherits_tokenizer(config, overrides):
        config = copy.deepcopy(config)
        for key in OmegaConf.missing_keys(config):
            if key.startswith(SETTING):
                OmegaConf.update(config, key, None)
    return OmegaConf.to_container(config, resolve=True, throw_on_missing=True)


def inherit_tokenizer(config: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Returns a composed training config, with the checkpoint's tokenizer where `inherits_tokenizer`.

    Raises:
        ConfigError: the overrides give a setting that the checkpoint's tokenizer does not have, or the checkpoint has
            no tokenizer.json and they choose no tokenizer.
    """
    if not inherits_tokenizer(config, overrides):
        return dict(config)
    start = config["init_from"]
    file = tokenizer_of(start)
    choices = "data/tokenizer=bpe, bytes, or saved with data.tokenizer.path=..."
    if not file.is_file() and (is_pretrained(start) or Path(start).exists()):
        raise ConfigError(
            f"init_from={start}: must have a {FILE} ({file} is missing), or a tokenizer chosen by name: {choices}"
        )
    for key in _keys(overrides):
        value = config["data"]["tokenizer"].get(key.removeprefix(SETTING)) if key.startswith(SETTING) else None
        if value is not None and file.is_file() and not _has(file, key.removeprefix(SETTING), value):
            raise ConfigError(
                f"{key}={value}: must be left out, for init_from={start} gives its tokenizer; another is chosen by"
                f" name: {choices}"
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


def _keys(overrides: Sequence[str]) -> list[str]:
    return [override.lstrip("+~").partition("=")[0] for override in overrides]


def _has(file: Path, name: str, value: Any) -> bool:
    """Whether a setting describes the tokenizer of a file: the tokenizer itself, or the config of its run."""
    from data.tokenizers import Saved, load

    own, config = load(file), file.with_name("config.yaml")
    if name == "path":
        return Saved(value).identity() == own.identity()
    if name == "lossy":
        return (value == "allow") == own.lossy
    settings = yaml.safe_load(config.read_text(encoding="utf-8"))["data"]["tokenizer"] if config.is_file() else {}
    return value in (settings.get(name), getattr(own, name, None))


def _saved(file: Path) -> dict[str, str]:
    """Returns the `data.tokenizer` settings of a tokenizer.json, as in configs/data/tokenizer/saved.yaml."""
    return {"_target_": "data.tokenizers.Saved", "path": str(file)}

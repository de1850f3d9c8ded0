"""Models in Hugging Face's format, named by `hf:FOLDER` or `hf:OWNER/NAME`: from their files to the settings of a run.

In the groups model=hf and attention=hf, null stands for the value that follows from config.json.
"""

import functools
import logging
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from configs.aliases import upgrade
from configs.errors import ConfigError, refused
from model.config import NO_ROPE
from model.pretrained.config_file import Architecture, read_architecture
from model.pretrained.rope_parameters import UNSCALED
from model.training.run_folder import RunFolderError, find_checkpoint

if TYPE_CHECKING:
    from model.pretrained.weights import Weights

log = logging.getLogger(__name__)

PREFIX = "hf:"
GROUP = "hf"
"""The name of the choices of the groups `model` and `attention` that follow a config.json."""

DOWNLOADED = ("*.json", "model*.safetensors")
"""The files that are downloaded from the Hub, where some models have their weights a second time in another format."""

CONFIGS = Path(__file__).parent


def is_pretrained(name: object) -> bool:
    """Whether a setting names a model in Hugging Face's format."""
    return isinstance(name, str) and name.startswith(PREFIX)


@functools.lru_cache
def pretrained_folder(name: str) -> Path:
    """Returns the folder of a model, which is downloaded if `name` is that of a model on the Hub.

    Raises:
        ConfigError: there is no such folder, and no such model on the Hub, or it cannot be downloaded.
    """
    given = name.removeprefix(PREFIX)
    folder = Path(given).expanduser()
    if folder.is_dir():
        return folder.absolute()
    accepted = "hf: and a folder with config.json, *.safetensors and tokenizer.json, or a model OWNER/NAME of the Hub"
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", given):
        raise ConfigError(f"{name}: must be {accepted}; there is no such folder")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(given, allow_patterns=list(DOWNLOADED)))
    except Exception as error:  # of the network, of the Hub, and of the file system
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise ConfigError(f"{name}: must be {accepted}; there is no such folder, and on the Hub: {reason}") from None


def with_pretrained(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a composed training config with the values that follow from the config.json of `init_from=hf:...`. If
    `init_from` is a run, model=hf has the run's sizes.

    Raises:
        ConfigError, PretrainedError: `init_from` and the groups don't fit each other, or the model cannot be read.
    """
    start, model, attention = (config.get(key) for key in ("init_from", "model", "attention"))
    if not isinstance(model, Mapping) or not isinstance(attention, Mapping):
        return dict(config)  # the schema refuses it
    if not is_pretrained(start):
        if isinstance(start, str) and start and model.get("name") == GROUP and model.get("width") is None:
            model = fill_model(model, Architecture(_model_of_run(start), ()))
        for group, settings, key in (("model", model, "width"), ("attention", attention, "patterns")):
            if settings.get("name") == GROUP and settings.get(key) is None:
                raise refused(group, GROUP, "another choice, or have init_from=hf:FOLDER, which gives its values")
        return {**config, "model": model}
    if model.get("name") != GROUP:
        raise refused("model", model.get("name"), f"hf with init_from={start}, whose config.json gives the sizes")
    architecture = read_architecture(pretrained_folder(start))
    if architecture.unrotated and attention.get("patterns") is not None:
        _warn_of_unrotated(str(attention.get("name")), ", ".join(map(str, sorted(architecture.unrotated))), start)
    return {**config, "model": fill_model(model, architecture), "attention": fill_attention(attention, architecture)}


@functools.cache
def _warn_of_unrotated(attention: str, layers: str, start: str) -> None:
    """Warns once: a command reads the same config.json for its checks and for its run, and a sweep for every job."""
    text = "attention=%s: rope=none of a pattern leaves out rotary embeddings, which layers %s of %s do not have"
    log.warning(text, attention, layers, start)


def _model_of_run(start: str) -> dict[str, Any]:
    """Returns the group `model` of the run `start`. Its attention is not read: it may name classes outside this
    repository."""
    from model.training.checkpoints import CheckpointFile

    try:
        saved = CheckpointFile(find_checkpoint(start)).read("hyper_parameters")
    except RunFolderError as error:
        raise ConfigError(f"init_from={start}: {error}") from None
    return dict(upgrade(saved["hyper_parameters"])["model"])


def fill_model(model: Mapping[str, Any], architecture: Architecture) -> dict[str, Any]:
    """Returns a `model` group without the nulls that follow from config.json. Another scaling of rotary embeddings
    replaces that of config.json as a whole; with another scaling or factor, `max_length` is what they reach."""
    settings, scaling = architecture.settings, model.get("rope_scaling")
    if scaling is not None and scaling != settings["rope_scaling"]:
        settings = settings | UNSCALED
    filled = {key: settings.get(key) if value is None else value for key, value in model.items()}
    rescaled = scaling is not None or model.get("rope_factor") is not None
    factor, original = filled.get("rope_factor"), filled.get("rope_original_length")
    if rescaled and model.get("max_length") is None and isinstance(factor, int | float) and isinstance(original, int):
        filled["max_length"] = math.floor(factor * original)
    return filled


def fill_attention(attention: Mapping[str, Any], architecture: Architecture) -> dict[str, Any]:
    """Returns an `attention` group whose null `patterns` and `schedule` are those of config.json."""
    follows = {"patterns": patterns_of(architecture), "schedule": schedule_of(architecture)}
    return {key: follows.get(key) if value is None else value for key, value in attention.items()}


def patterns_of(architecture: Architecture) -> dict[str, Any]:
    """Returns the entries of attention.patterns for the layers: `full`, `local`, and both without rotary embeddings."""
    patterns: dict[str, Any] = {}
    for layer, (name, width) in enumerate(zip(_names_of(architecture), architecture.windows, strict=True)):
        if width is None:
            patterns[name] = {"_target_": "kernels.patterns.Dense"}
        else:
            patterns[name] = {"_target_": "kernels.patterns.Window", "width": width, "sink_tokens": 0}
        if layer in architecture.unrotated:
            patterns[name]["rope"] = NO_ROPE
    return patterns


def _names_of(architecture: Architecture) -> list[str]:
    """Returns the name of each layer's pattern."""
    kinds = ["full" if width is None else "local" for width in architecture.windows]
    return [f"{kind}_unrotated" if layer in architecture.unrotated else kind for layer, kind in enumerate(kinds)]


def schedule_of(architecture: Architecture) -> list[str]:
    """Returns the shortest attention.schedule that gives the layers their patterns when it is repeated."""
    names = _names_of(architecture)
    period = next(p for p in range(1, len(names) + 1) if names == (names[:p] * len(names))[: len(names)])
    return names[:period]


def groups_of(name: str) -> dict[str, Any]:
    """Returns the groups `model` and `attention` that model=hf and attention=hf give with init_from=`name`."""
    architecture, found = read_architecture(pretrained_folder(name)), {}
    for group, fill in (("model", fill_model), ("attention", fill_attention)):
        files = [CONFIGS / group / f"{choice}.yaml" for choice in ("base", GROUP)]
        base, own = (yaml.safe_load(file.read_text(encoding="utf-8")) for file in files)
        found[group] = fill({key: value for key, value in (base | own).items() if key != "defaults"}, architecture)
    return found


def weights_of(name: str) -> "Weights":
    """Returns the weights of a model. Errors are those of `pretrained_folder` and `Weights`."""
    from model.pretrained.weights import Weights

    return Weights(pretrained_folder(name))

"""From a composed config to the objects that it describes. What cannot be built is a ConfigError with its key."""

import importlib
from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import TYPE_CHECKING, Any

from kernels import patterns
from kernels.patterns import Pattern
from model import AttentionPlan, ModelConfig, Transformer

if TYPE_CHECKING:
    from lightning.pytorch.loggers import Logger

    from data import DataModule
    from model.evaluation import Protocol
    from model.training.run_folder import RunFolder


class ConfigError(ValueError):
    """A setting that cannot be: one line with its key, its value, and what would be accepted."""


def build_pattern(key: str, settings: Mapping[str, Any]) -> Pattern:
    """The pattern of one entry of attention.patterns; `_target_` is the path of its class."""
    settings = dict(settings)
    target = settings.pop("_target_", None)
    module, _, name = str(target).rpartition(".")
    try:
        pattern_class = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError):
        known = ", ".join(f"{patterns.__name__}.{n}" for n in patterns.__all__ if n != "Pattern")
        raise ConfigError(
            f"{key}._target_={target}: no such pattern; accepted are {known}, or a class of yours"
        ) from None
    if not (isinstance(pattern_class, type) and issubclass(pattern_class, Pattern)):
        raise ConfigError(f"{key}._target_={target}: must be a subclass of kernels.patterns.Pattern")
    accepted = [field.name for field in fields(pattern_class)]
    for setting in settings:
        if setting not in accepted:
            raise ConfigError(f"{key}.{setting}={settings[setting]!r}: {name} takes {', '.join(accepted)}")
    needed = [f.name for f in fields(pattern_class) if f.init and f.default is f.default_factory is MISSING]
    for setting in needed:
        if setting not in settings:
            raise ConfigError(f"{key}.{setting}: missing; {name} needs {', '.join(needed)}")
    try:
        return pattern_class(**settings)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{key}.{error}") from None


def build_plan(attention: Mapping[str, Any]) -> AttentionPlan:
    """The plan of a composed `attention` group. A pattern set to null is left out."""
    entries = {name: entry for name, entry in attention["patterns"].items() if entry is not None}
    built = {name: build_pattern(f"attention.patterns.{name}", entry) for name, entry in entries.items()}
    try:
        return AttentionPlan(
            patterns=built, schedule=attention["schedule"], block=attention["block"], backend=attention["backend"]
        )
    except ValueError as error:
        raise ConfigError(f"attention.{error}") from None


def build_model_config(model: Mapping[str, Any], tokenizer_vocabulary: int) -> ModelConfig:
    """The sizes of a composed `model` group; a vocabulary of null becomes the tokenizer's, rounded up to 64."""
    settings = {key: value for key, value in model.items() if key != "name"}
    if settings["vocabulary"] is None:
        settings["vocabulary"] = -(-tokenizer_vocabulary // 64) * 64
    elif settings["vocabulary"] < tokenizer_vocabulary:
        raise ConfigError(
            f"model.vocabulary={settings['vocabulary']}: the tokenizer has {tokenizer_vocabulary} tokens; "
            "accepted is that or more, or null"
        )
    try:
        return ModelConfig(**settings)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"model.{error}") from None


def build_model(config: Mapping[str, Any], tokenizer_vocabulary: int) -> Transformer:
    """The model of a composed config, freshly initialized."""
    return Transformer(build_model_config(config["model"], tokenizer_vocabulary), build_plan(config["attention"]))


def build_protocol(protocol: Mapping[str, Any], sequence_length: int) -> "Protocol":
    """The scoring protocol; a window of null is as long as the training sequences."""
    from model.evaluation import Protocol

    settings = dict(protocol)
    if settings["window"] is None and settings["name"] != "whole":
        settings["window"] = sequence_length
    try:
        return Protocol(**settings)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"evaluation.{error}") from None


def build_data(data: Mapping[str, Any]) -> "DataModule":
    """The data module of a composed `data` group, not set up yet. Raises data.CorpusError for what it cannot be."""
    from hydra.errors import InstantiationException
    from hydra.utils import instantiate

    try:
        return instantiate(data)
    except InstantiationException as error:
        cause = error.__cause__
        if isinstance(cause, ValueError):  # ours, with the key and what would be accepted
            raise cause from None
        raise ConfigError(f"data: {cause or error}") from None


def build_loggers(logger: Mapping[str, Any], config: Mapping[str, Any], folder: "RunFolder") -> "list[Logger]":
    """What a `logger` group adds to metrics.csv. wandb is imported only here, and only where it was chosen."""
    if logger["name"] == "csv":
        return []
    if logger["name"] != "wandb":
        raise ConfigError(f"logger.name={logger['name']}: must be csv or wandb")
    from lightning.pytorch.loggers import WandbLogger

    return [
        WandbLogger(
            name=folder.path.parent.name + "/" + folder.path.name,
            save_dir=folder.path,
            project=logger["project"],
            group=logger["group"],
            tags=list(logger["tags"]),
            mode=logger["mode"],
            config=dict(config),
        )
    ]

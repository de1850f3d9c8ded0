"""Builds the objects that a composed config describes. A setting that cannot be built is a ConfigError with its key."""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from configs.errors import ConfigError
from configs.mixture import build_source
from configs.trust import TARGET, construct, construct_with, function_of
from configs.validation import check_arguments, validated
from kernels.patterns import Pattern
from kernels.patterns.consistency import check_consistency
from model import AttentionPlan, ModelConfig, Transformer
from model.attention import training_class
from model.config import MODEL_ROPE, NO_ROPE, Rope

if TYPE_CHECKING:
    from lightning.pytorch.loggers import Logger

    from data import DataModule
    from model.evaluation import Protocol
    from model.training.run_folder import RunFolder


OF_THE_SUITE = {"passkey": ("depth",), "copy": ("distance",), "retrieval": ("distance",)}
"""Arguments of a task that the recall suite gives."""

ROPE = "rope"
"""The key of a pattern's entry that holds the rotary embeddings of its layers."""

RopeBase = Annotated[float, Field(gt=0, strict=True, allow_inf_nan=False)]


def build_pattern(key: str, settings: Mapping[str, Any]) -> tuple[Pattern, object | None]:
    """The pattern of one entry of attention.patterns, and the settings that train its family's own parameters.
    `_target_` is the path of the pattern's class (configs/trust.py). `rope` is not read."""
    if isinstance(settings, Mapping):
        settings = {name: value for name, value in settings.items() if name != ROPE}
    try:
        return construct_with(key, settings, Pattern, training_class)
    except ConfigError:
        raise
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{key}.{error}") from None


def build_plan(attention: Mapping[str, Any]) -> AttentionPlan:
    """Returns the plan of a composed `attention` group. A pattern set to null is left out."""
    entries = {name: entry for name, entry in attention["patterns"].items() if entry is not None}
    built = {name: build_pattern(f"attention.patterns.{name}", entry) for name, entry in entries.items()}
    ropes = {name: read_rope(f"attention.patterns.{name}", entry) for name, entry in entries.items()}
    try:
        plan = AttentionPlan(
            patterns={name: pattern for name, (pattern, _) in built.items()},
            schedule=attention["schedule"],
            block=attention["block"],
            backend=attention["backend"],
            training={name: training for name, (_, training) in built.items() if training is not None},
            rope={name: rope for name, rope in ropes.items() if rope != MODEL_ROPE},
        )
    except ValueError as error:
        raise ConfigError(f"attention.{error}") from None
    for name, pattern in plan.patterns.items():
        try:
            check_consistency(pattern, plan.block)
        except ValueError as error:
            raise ConfigError(f"attention.patterns.{name}.{error}") from None
    return plan


def read_rope(key: str, entry: Mapping[str, Any]) -> Rope:
    """Returns the rotary embeddings of one entry of attention.patterns; by default they are the model's."""
    return validated(Literal[MODEL_ROPE, NO_ROPE] | RopeBase, entry.get(ROPE, MODEL_ROPE), f"{key}.{ROPE}")


def build_model_config(model: Mapping[str, Any], tokenizer_vocabulary: int) -> ModelConfig:
    """Returns the sizes of a composed `model` group. A vocabulary of null becomes the tokenizer's, rounded up to 64."""
    settings = {key: value for key, value in model.items() if key != "name"}
    if settings["vocabulary"] is None:
        settings["vocabulary"] = -(-tokenizer_vocabulary // 64) * 64
    elif settings["vocabulary"] < tokenizer_vocabulary:
        raise ConfigError(
            f"model.vocabulary={settings['vocabulary']}: must be at least {tokenizer_vocabulary}, the tokenizer's "
            "vocabulary, or null"
        )
    try:
        return ModelConfig(**settings)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"model.{error}") from None


def build_model(config: Mapping[str, Any], tokenizer_vocabulary: int, plan: AttentionPlan | None = None) -> Transformer:
    """Returns the model of a composed config, freshly initialized. `plan`: that of its `attention`, if it is built."""
    plan = plan or build_plan(config["attention"])
    return Transformer(build_model_config(config["model"], tokenizer_vocabulary), plan)


def build_protocol(protocol: Mapping[str, Any], sequence_length: int) -> "Protocol":
    """Returns the scoring protocol. A window of null is as long as the training sequences."""
    from model.evaluation import Protocol

    settings = dict(protocol)
    if settings["window"] is None and settings["name"] != "whole":
        settings["window"] = sequence_length
    try:
        return Protocol(**settings)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"evaluation.{error}") from None


def build_data(data: Mapping[str, Any]) -> "DataModule":
    """Returns the data module of a composed `data` group, not set up yet.

    Raises:
        ConfigError, data.CorpusError: a setting is refused.
    """
    from data import CorpusError, DataModule
    from data.tokenizers import Tokenizer

    try:
        tokenizer = construct("data.tokenizer", data.get("tokenizer"), Tokenizer)
        return construct("data", data, DataModule, {"source": build_source(data), "tokenizer": tokenizer})
    except (ConfigError, CorpusError):
        raise
    except (TypeError, ValueError) as error:
        raise ConfigError(f"data: {error}") from None


def build_task(key: str, settings: Mapping[str, Any]) -> Callable:
    """Returns the function of one entry of recall.tasks (data.recall.text.needles, ...) with its settings bound."""
    from data.recall.text import TASKS

    arguments = {name: value for name, value in settings.items() if name != TARGET}
    ours = {f"{task.__module__}.{task.__name__}": task for task in TASKS}
    task = function_of(f"{key}.{TARGET}", settings.get(TARGET), ours)
    material_length_generator = list(inspect.signature(task).parameters)[:3]
    of_the_suite = OF_THE_SUITE.get(key.rpartition(".")[2], ())
    check_arguments(key, arguments, task, given=(*material_length_generator, *of_the_suite))
    return functools.partial(task, **arguments)


def build_loggers(logger: Mapping[str, Any], config: Mapping[str, Any], folder: "RunFolder") -> "list[Logger]":
    """Returns the loggers of a `logger` group besides metrics.csv. wandb is imported only if it is chosen."""
    if logger["name"] == "csv":
        return []
    from lightning.pytorch.loggers import WandbLogger

    return [
        WandbLogger(
            name=folder.path.parent.name + "/" + folder.path.name,
            save_dir=folder.path,
            id=folder.wandb_id(),  # a resumed run continues its wandb run
            resume="allow",
            project=logger["project"],
            group=logger["group"],
            tags=list(logger["tags"]),
            mode=logger["mode"],
            config=dict(config),
        )
    ]

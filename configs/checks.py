"""What a composed config must satisfy before any work starts. A failure is one line: key, value, what is accepted."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from configs.build import ConfigError, build_data, build_model_config, build_plan, build_protocol, build_task
from kernels.attention import BACKENDS, GPU_BACKENDS
from kernels.shapes import BLOCKS
from model.attention import attend_class
from model.training.endings import ON_NAN

TRAINER_KEYS = (
    *("max_steps", "max_seconds", "accumulate", "gradient_clip", "validate_every", "save_every", "log_every"),
    *("precision", "accelerator", "devices", "strategy", "compile", "on_nan", "max_skipped_steps"),
)
EVALUATION_KEYS = ("split", "tokens_at_once", "long_document", "baselines", "protocol", "by_context", "key_tokens")
PREFLIGHT = ("warn", "refuse", "off")
PRECISIONS = ("64-true", "32-true", "16-mixed", "bf16-mixed", "bf16-true")


def check(config: Mapping[str, Any]) -> None:
    """Raises ConfigError (or data.CorpusError) for the first setting of a composed training config that cannot be."""
    check_keys(config)
    check_attention(config)
    check_data(config)
    check_trainer(config["trainer"])
    check_backend(config)
    check_optimizer(config["optimizer"])
    check_evaluation(config["evaluation"], config["data"]["sequence_length"])
    check_runs(config)
    check_seed(config["seed"])


def check_keys(config: Mapping[str, Any]) -> None:
    """Keys that `+key=value` has added and nothing reads, and those that `~key` has taken away."""
    if "sweep" in config:
        name = config["sweep"]["name"]
        raise ConfigError(f"sweep={name}: a sweep takes -m and overrides alone: python train.py -m sweep={name}")
    groups = ("attention", "data", "evaluation", "logger", "model", "optimizer", "trainer")
    keys = (*groups, "name", "outputs", "seed", "resume", "init_from", "preflight")
    _require_known("", config, (*keys, "trust"))
    for key in keys:
        if key not in config:
            raise ConfigError(f"~{key}: a run needs it; accepted is {key}=...")
    _require_in("preflight", config["preflight"], PREFLIGHT)
    _require_known("attention.", config["attention"], ("name", "patterns", "schedule", "block", "backend"))
    _require_known("trainer.", config["trainer"], TRAINER_KEYS)


def check_attention(config: Mapping[str, Any]) -> None:
    """Patterns, schedule, tile size and backend; and the sizes of the model that uses them."""
    attention, sizes = config["attention"], build_model_config(config["model"], tokenizer_vocabulary=1)
    _require_in("attention.block", attention["block"], BLOCKS)
    _require_in("attention.backend", attention["backend"], ("auto", *BACKENDS))
    plan = build_plan(attention)
    for layer in range(sizes.layers):
        try:
            attend_class(plan.pattern(layer, sizes.kv_heads))
        except ValueError as error:
            raise ConfigError(f"attention.{error}") from None


def check_data(config: Mapping[str, Any]) -> None:
    """Lengths, and what the data module itself can check without reading documents."""
    length, limit = config["data"]["sequence_length"], config["model"]["max_length"]
    if not isinstance(length, int) or not 1 <= length <= limit:
        raise ConfigError(
            f"data.sequence_length={length}: must be between 1 and the model's limit, model.max_length={limit}"
        )
    build_data(config["data"])


def check_trainer(trainer: Mapping[str, Any]) -> None:
    """Step counts, and whether this machine's devices can do what is asked."""
    for key, optional in (
        ("max_steps", trainer["max_seconds"] is not None),
        ("accumulate", False),
        ("log_every", False),
        ("validate_every", True),
        ("save_every", True),
    ):
        _require_count(f"trainer.{key}", trainer[key], optional)
    seconds = trainer["max_seconds"]
    if seconds is not None and (isinstance(seconds, bool) or not isinstance(seconds, int | float) or seconds <= 0):
        raise ConfigError(f"trainer.max_seconds={seconds}: must be a positive number, or null")
    clip = trainer["gradient_clip"]
    if clip is not None and not clip > 0:
        raise ConfigError(f"trainer.gradient_clip={clip}: must be a positive number, or null")
    check_device(trainer["accelerator"], trainer["precision"], "trainer.")
    _require_in("trainer.on_nan", trainer["on_nan"], ON_NAN)
    skipped = trainer["max_skipped_steps"]
    if skipped != 0:
        _require_count("trainer.max_skipped_steps", skipped, optional=False)
    if not isinstance(trainer["compile"], bool):
        raise ConfigError(f"trainer.compile={trainer['compile']}: must be true or false")


def check_device(accelerator: str, precision: str, prefix: str = "") -> None:
    """Whether this machine has the device, and the device the precision. `prefix` is where the two keys stand."""
    import torch

    _require_in(f"{prefix}precision", precision, PRECISIONS)
    present = ("cpu", "auto", *(["cuda", "gpu"] if torch.cuda.is_available() else []))
    if accelerator not in present:
        raise ConfigError(f"{prefix}accelerator={accelerator}: this machine has {', '.join(present)}")
    on_gpu = torch.cuda.is_available() and accelerator != "cpu"
    if precision == "16-mixed" and not on_gpu:
        raise ConfigError(
            f"{prefix}precision=16-mixed needs a GPU: accepted on a CPU are 32-true, 64-true, bf16-mixed and bf16-true"
        )
    if precision.startswith("bf16") and on_gpu and not torch.cuda.is_bf16_supported():
        name = torch.cuda.get_device_name()
        raise ConfigError(f"{prefix}precision={precision}: {name} has no bfloat16; accepted are 16-mixed and 32-true")


def check_backend(config: Mapping[str, Any]) -> None:
    """Whether the attention backend that is named outright can run on the device that is asked for."""
    import torch

    on_gpu = torch.cuda.is_available() and config["trainer"]["accelerator"] != "cpu"
    backend = config["attention"]["backend"]
    if backend in GPU_BACKENDS and not on_gpu:
        raise ConfigError(f"attention.backend={backend} needs a GPU: accepted on a CPU are auto, reference and blocked")
    if backend in ("flex", "flex_flash"):
        _require_in("attention.block", config["attention"]["block"], (128,))
        for name, pattern in build_plan(config["attention"]).patterns.items():
            if not pattern.is_mask:
                raise ConfigError(
                    f"attention.backend={backend} serves masks alone, and attention.patterns.{name} makes or chooses "
                    "its keys: accepted are auto, triton, reference and blocked"
                )
    if backend == "flex_flash" and config["model"]["sink_logits"]:
        raise ConfigError(
            "attention.backend=flex_flash gives no gradient to sinks: with model.sink_logits=true accepted are auto, "
            "triton, flex, reference and blocked"
        )
    if backend == "flash":
        raise ConfigError(
            "attention.backend=flash knows no packed documents, and training packs them: accepted are auto and "
            f"{', '.join(name for name in BACKENDS if name != 'flash')}"
        )


def check_optimizer(optimizer: Mapping[str, Any]) -> None:
    """Names and ranges; the optimizer itself checks the rest."""
    from model.training.optimizer import SCHEDULES

    _require_in("optimizer.name", optimizer["name"], ("adamw", "muon"))
    _require_in("optimizer.schedule.name", optimizer["schedule"]["name"], tuple(SCHEDULES))
    if not optimizer["learning_rate"] > 0:
        raise ConfigError(f"optimizer.learning_rate={optimizer['learning_rate']}: must be positive")


def check_evaluation(evaluation: Mapping[str, Any], sequence_length: int) -> None:
    """The protocol, which split it is for, and what is measured beside the loss."""
    from model.training.run_folder import find_checkpoint

    _require_known("evaluation.", evaluation, EVALUATION_KEYS)
    _require_in("evaluation.split", evaluation["split"], ("train", "validation", "test"))
    _require_count("evaluation.tokens_at_once", evaluation["tokens_at_once"], optional=False)
    build_protocol(evaluation["protocol"], sequence_length)

    by_context, key_tokens = evaluation["by_context"], evaluation["key_tokens"]
    _require_known("evaluation.by_context.", by_context, ("contexts", "targets"))
    _require_count("evaluation.by_context.targets", by_context["targets"], optional=False)
    if not isinstance(by_context["contexts"], list):
        raise ConfigError(
            f"evaluation.by_context.contexts={by_context['contexts']}: must be a list, of integers >= 1 or whole"
        )
    for context in by_context["contexts"]:
        if context != "whole" and not _is_count(context):
            raise ConfigError(f"evaluation.by_context.contexts holds {context!r}: must be integers >= 1, or whole")
    _require_known("evaluation.key_tokens.", key_tokens, ("evaluator", "short_context", "gain", "confidence"))
    _require_count("evaluation.key_tokens.short_context", key_tokens["short_context"], optional=False)
    for key in ("gain", "confidence"):
        if not isinstance(key_tokens[key], int | float):
            raise ConfigError(f"evaluation.key_tokens.{key}={key_tokens[key]}: must be a number")
    if not key_tokens["gain"] > 0:
        raise ConfigError(f"evaluation.key_tokens.gain={key_tokens['gain']}: must be positive, in nats")
    if not key_tokens["confidence"] <= 0:
        raise ConfigError(f"evaluation.key_tokens.confidence={key_tokens['confidence']}: must be a log-likelihood <= 0")
    if key_tokens["evaluator"]:
        find_checkpoint(key_tokens["evaluator"])


def check_recall(recall: Mapping[str, Any]) -> None:
    """Counts, lengths, depths and tasks of the recall suite."""
    _require_known("recall.", recall, ("lengths", "samples", "tokens_at_once", "depths", "distances", "tasks"))
    for key in ("samples", "tokens_at_once"):
        _require_count(f"recall.{key}", recall[key], optional=False)
    for key in ("lengths", "distances"):
        values = recall[key]
        if values is not None and not (isinstance(values, list) and values and all(map(_is_count, values))):
            raise ConfigError(f"recall.{key}={values}: must be a list of integers >= 1, or null")
    depths = recall["depths"] if isinstance(recall["depths"], list) else []
    if not depths or not all(isinstance(depth, int | float) and 0 <= depth <= 1 for depth in depths):
        raise ConfigError(f"recall.depths={recall['depths']}: must be a list of numbers between 0 and 1")
    for name, entry in recall["tasks"].items():
        if entry is not None:
            build_task(f"recall.tasks.{name}", entry)
    if not any(recall["tasks"].values()):
        raise ConfigError(f"recall.tasks={recall['tasks']}: must hold at least one task")


def check_runs(config: Mapping[str, Any]) -> None:
    """`init_from` and `resume`, and the run's name."""
    from model.training.run_folder import RunFolder, find_checkpoint, folder_of, new_run_path

    if config["resume"] and config["init_from"]:
        raise ConfigError(
            f"init_from={config['init_from']}: a run that resumes has weights already; give resume or init_from"
        )
    if config["resume"]:
        RunFolder.open(folder_of(find_checkpoint(config["resume"], prefer="last")))
    if config["init_from"]:
        find_checkpoint(config["init_from"])
    new_run_path(Path(config["outputs"]), config["name"])


def check_seed(seed: object) -> None:
    """What NumPy's generators take, too."""
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**32:
        raise ConfigError(f"seed={seed}: must be an integer from 0 to {2**32 - 1}")


def _require_known(prefix: str, settings: Mapping[str, Any], accepted: tuple[str, ...]) -> None:
    for key, value in settings.items():
        if key not in accepted:
            raise ConfigError(f"{prefix}{key}={value}: no such key; accepted are {', '.join(sorted(accepted))}")


def _require_in(key: str, value: object, accepted: tuple) -> None:
    if value not in accepted:
        raise ConfigError(f"{key}={value}: must be one of {', '.join(map(str, accepted))}")


def _require_count(key: str, value: object, optional: bool) -> None:
    if (value is None and optional) or _is_count(value):
        return
    raise ConfigError(f"{key}={value}: must be an integer >= 1" + (", or null" if optional else ""))


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1

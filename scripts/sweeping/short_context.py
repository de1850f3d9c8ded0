"""Runs at short context: the first stage of a sweep, from whose weights every job starts, and the control.

The control is the baseline at short context, with the same budget as every job: what long context must beat.

A step of such a run trains on as many tokens as one of the jobs, in shorter sequences. It is evaluated in windows
of its own length, since it was not trained for longer contexts; every token of the text is scored once all the same.
"""

from collections.abc import Mapping
from typing import Any

from configs.errors import as_override, refused
from configs.pretrained import is_pretrained
from configs.schema import FirstStage
from scripts.sweeping.points import Overrides

OF_ONE_STAGE = ("data.sequence_length", "data.batch_size", "trainer.max_steps", "trainer.max_seconds")
"""Settings that the two stages do not share, besides the attention and the learning rate."""

OF_EVERY_ATTENTION = ("attention.backend", "attention.block")
"""Settings of the attention that full attention shares with every pattern."""


def shortened(config: Mapping[str, Any], length: int, key: str) -> Overrides:
    """Returns the overrides that shorten the run of a composed config to sequences of `length` tokens.

    Args:
        config: of a run with longer sequences.
        key: the setting that holds `length`, for messages.

    Raises:
        ConfigError: the length does not fit the config's.
    """
    from data.excerpts import default_limit

    data, evaluation = config["data"], config["evaluation"]
    protocol = evaluation["protocol"]
    if length >= data["sequence_length"]:
        raise refused(key, length, f"less than data.sequence_length={data['sequence_length']}")
    tokens = data["sequence_length"] * data["batch_size"]
    if tokens % length:
        raise refused(key, length, f"a divisor of the {tokens} tokens of data.sequence_length and data.batch_size")
    short = {"data.sequence_length": str(length), "data.batch_size": str(tokens // length)}
    if config["phases"] is not None:  # lengths that grow during a run
        short["phases"] = "null"
    if data["validation_sequences"] is not None:
        sequences = data["validation_sequences"] * data["sequence_length"] // length
        short["data.validation_sequences"] = str(sequences)
    if protocol["name"] == "whole":
        short["evaluation.protocol.name"] = "sliding"
    if protocol["window"] is not None and protocol["window"] > length:
        short["evaluation.protocol.window"] = "null"
    if protocol["stride"] is not None and protocol["stride"] > length:
        short["evaluation.protocol.stride"] = "null"
    if evaluation["limit"] == "auto":  # the same text for both lengths
        short["evaluation.limit"] = str(default_limit(data["sequence_length"]))
    return short | _shorter_contexts(evaluation["by_context"], data["sequence_length"], length)


def _shorter_contexts(by_context: Mapping[str, Any], longer: int, length: int) -> Overrides:
    """Returns the overrides that score the documents of the longer run, under those of its contexts that fit into
    `length` tokens, and by default under the longest that does."""
    from model.evaluation.context import WHOLE, default_contexts, least_tokens

    targets, contexts = by_context["targets"], by_context["contexts"]
    own = default_contexts(length, targets) if contexts is None else contexts
    contexts = default_contexts(longer, targets) if contexts is None else contexts
    if not contexts:
        return {}
    fitting = [context for context in own if context != WHOLE and context + targets <= length]
    least = by_context["least_tokens"] or least_tokens(contexts, targets)
    key = "evaluation.by_context"
    return {f"{key}.contexts": as_override(fitting), f"{key}.least_tokens": str(least)}


def control_of(job: Overrides, config: Mapping[str, Any], length: int, extended: bool) -> Overrides:
    """Returns the overrides of the control.

    Args:
        job: the overrides of a job of the baseline.
        config: the job's composed config.
        length: tokens of a sequence of the control.
        extended: whether the job starts from a first stage. The control then has that stage's RoPE. So it has up to
            `model.rope_original_length`, which is the length of the model that `init_from` names.
    """
    kept = {key: value for key, value in job.items() if key not in ("data.sequence_length", "data.batch_size")}
    unscaled = extended or length <= config["model"]["rope_original_length"]
    return kept | shortened(config, length, "sweep.control") | (without_extension(config) if unscaled else {})


def first_stage_of(job: Overrides, config: Mapping[str, Any], settings: FirstStage) -> Overrides:
    """Returns the overrides of the run from whose weights a job starts, without its number of steps.

    Args:
        job: the job's overrides; settings of both stages are kept, such as the seed and the model.
        config: the job's composed config.
        settings: `sweep.first_stage`.
    """
    own = ("attention", "optimizer.learning_rate", *OF_ONE_STAGE)
    kept = {
        key: value for key, value in job.items() if key in OF_EVERY_ATTENTION or not key.lstrip("+~").startswith(own)
    }
    short = shortened(config, settings.sequence_length, "sweep.first_stage.sequence_length")
    stage = {"attention": "dense"} | kept | short | without_extension(config)
    # In the order of the jobs' seed, the control would repeat the sequences with which this stage began, and a job of
    # longer sequences would not: they would differ in how lately they read what they read again.
    stage["data.seed"] = str((config["data"]["seed"] + 2**31) % 2**32)
    if settings.init_from is not None:
        stage["init_from"] = as_override(settings.init_from)
    elif config["init_from"] is not None:
        stage["init_from"] = "null"
    if config["trainer"]["max_seconds"] is not None:
        stage["trainer.max_seconds"] = "null"
    if settings.learning_rate is not None:
        stage["optimizer.learning_rate"] = str(settings.learning_rate)
    return stage


def without_extension(config: Mapping[str, Any]) -> Overrides:
    """Returns the overrides of a model without the RoPE scaling that a longer context needs. A model in Hugging Face's
    format keeps that of its config.json."""
    if is_pretrained(config["init_from"]):
        return dict.fromkeys(("model.rope_scaling", "model.rope_factor", "model.rope_original_length"), "null")
    if config["model"]["rope_scaling"] == "none":
        return {}
    return {"model.rope_scaling": "none", "model.rope_factor": "1"}

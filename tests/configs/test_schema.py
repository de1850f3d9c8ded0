"""Every key of every group and command is given wrong values: each is accepted with a meaning, or is one line that
names the key. The checks run in this process, on a config that is composed once and then changed."""

import copy
import functools
import math
import typing
from collections.abc import Iterator, Mapping
from fnmatch import fnmatch

import pytest
from omegaconf import OmegaConf

from configs import checks, schema
from data.sequences.packing import PACKINGS
from data.sources import SPLITS
from kernels.dispatch import BACKENDS
from kernels.shapes import BLOCK_SIZES
from model.config import ROPE_SCALINGS
from model.evaluation.layer_schedules import MEASURES
from model.evaluation.protocol import NAMES
from model.precision import FP8
from model.training.failures import ON_NAN
from scripts.sweeping.composer import Composer
from scripts.sweeping.settings import Settings
from tests.commands import ROOT, compose

WRONG = ("nonsense", "", None, -1, 2.5, math.nan, math.inf, True, [1], ["nonsense"], {"nonsense": 1})

TEXT = (
    "*/name",
    "attention.name",
    "model.name",
    "sweep.name",
    "*/outputs",
    "data.cache",
    "logger.project",
    "logger.group",
)
TEXT += ("data.source.text_column", "data.source.config", "data.source.split", "data.source.revision")
TEXT += ("sweep.first_stage.init_from",)
TEXT += (
    "data.source.time_column",
    "*/output",
    "*/prompt_file",
    "*/prompt",
    "*/stop",
    "*/trust",
    "sweep.baseline",
    "sweep.search.minimize",
)
"""Keys that take any text, most of them any that is not empty. (`data.path` must be there, and so must other runs.)"""

EMPTY = ("generate/prompt",)
"""Keys that take an empty text."""

NULL = ("trainer.max_seconds", "trainer.gradient_clip", "trainer.validate_every", "trainer.save_every")
NULL += ("model.vocabulary", "data.validation_sequences", "data.source.config", "data.source.split")
NULL += ("data.source.revision", "evaluation.protocol.window", "evaluation.protocol.stride", "recall.tasks.*")
NULL += ("evaluation.key_tokens.evaluator", "logger.group", "*/resume", "*/init_from", "*/phases")
NULL += (
    "recall.lengths",
    "recall.tasks.*.queries",
    "data.source.tasks.*",
    "series.horizons",
    "series.context",
    "data.source.time_column",
)
NULL += (
    "recall.distances",
    "generate/*_file",
    "generate/stop",
    "generate/top_k",
    "*/trust",
    "sweep.baseline",
    "sweep.search.minimize",
    "sweep.match",
    "sweep.tokens",
)
NULL += ("sweep.seconds", "sweep.flops", "sweep.search", "preflight/output", "evaluate/output")
NULL += ("optimizer.indexer_learning_rate", "model.rope_attention_factor", "trainer.profile")
NULL += ("sweep.first_stage", "sweep.first_stage.learning_rate", "sweep.first_stage.init_from")
NULL += (
    "data.source.streams",
    "data.length_weights",
    "data.source.near_duplicates",
    "data.source.pairs",
    "data.source.tokens_at_a_time",
    "sweep.control",
)
NULL += ("evaluation.by_context.contexts", "evaluation.by_context.least_tokens", "evaluation.limit")
"""Keys whose null has a meaning. (A pattern may be null, too, where the schedule does not name it.)"""

FRACTION = ("trainer.max_seconds", "trainer.gradient_clip", "model.rope_theta", "model.norm_epsilon", "*/temperature")
FRACTION += ("optimizer.learning_rate", "optimizer.indexer_learning_rate", "optimizer.epsilon")
FRACTION += ("optimizer.weight_decay", "evaluation.key_tokens.gain")
FRACTION += (
    "sweep.tokens",
    "sweep.seconds",
    "sweep.flops",
    "attention.patterns.*.indexer_loss",
    "model.z_loss",
    "trainer.rank_timeout",
)
FRACTION += (
    "data.source.tasks.*.weight",
    "data.tokenizer.limit",
    "model.rope_beta_slow",
    "model.rope_beta_fast",
    "attention.patterns.*.rope",
)
FRACTION += ("sweep.first_stage.tokens", "sweep.first_stage.learning_rate")
"""Keys that take 2.5. (`model.rope_factor` and `model.rope_attention_factor` do with a scaling of RoPE.)"""

NEGATIVE = ("evaluation.key_tokens.confidence",)

TRUE = ("model.tie_embeddings", "model.sink_logits", "model.activation_checkpointing", "trainer.compile")
TRUE += (
    "data.source.streaming",
    "data.source.reverse_complement",
    "data.document_mask",
    "model.rope_truncate",
    "model.qk_norm",
    "model.qkv_bias",
)
TRUE += ("evaluation.baselines", "data.source.tests", "attention.patterns.*.first_block", "*/all", "*/cuda_graph")
TRUE += ("attention.patterns.*.indexer_gradient", "sweep.retry_failed", "sweep.isolate")

TEXTS = ("*/prompt", "*/stop", "*/trust", "logger.tags")
"""Keys that take a list of texts."""

INTEGERS = ("evaluation.by_context.contexts", "recall.lengths", "recall.distances", "recall.depths", "series.horizons")
INTEGERS += tuple(
    f"data.source.tasks.*.{each}"
    for each in ("spacing", "pairs", "keys", "values", "cue", "size", "excerpt", "passage")
)
"""Keys that take a list of integers."""

OPTIONAL = ("trust", "output")
"""Keys that their command takes out of the config before the checks."""


RECALL = ("recall", "recall_start")
EXCEPTIONS = (
    ("data=hub", "data.path", "nonsense"),
    *((f"data={each}", "data.path", None) for each in ("code", "mixture", "stdlib", *RECALL, "retrieval")),
    *((f"data={each}", "data.validation_sequences", None) for each in (*RECALL, "retrieval")),
    ("data=retrieval", "data.source.tasks.retrieval", None),
    *((f"data={each}", "data.source.parts", None) for each in ("genome", "strains")),
)
"""A name on the hub; this Python's library and packages; no path of its own; generated sequences, which have no end;
the only task; each sequence of a genome in one split."""

EARLIER = ("data.source.extensions", "data.source.split_by")
EARLIER += ("data.source.near_duplicates", "data.source.tokens_at_a_time", "data.source.pairs")
EARLIER += ("data.source.streaming", "data.source.streams", "data.source.held_out_documents")
EARLIER += tuple((f"data={each}", "data.source.text_column") for each in (*RECALL, "retrieval"))
EARLIER += tuple((f"data={each}", "data.source.parts") for each in ("genome", "strains"))
"""Keys, some of one choice alone, that saved configs of earlier versions lack: the class has the value of those."""


def has_meaning(key: str, value: object) -> bool:
    """Whether a key is to accept one of WRONG. Outside of groups the key follows its command: train/seed."""
    accepting: tuple[str, ...] = ()
    if isinstance(value, str):
        accepting += EMPTY if value == "" else TEXT
    elif isinstance(value, list):
        accepting += TEXTS if value == ["nonsense"] else INTEGERS
    elif not isinstance(value, dict):
        accepting += {None: NULL, -1: NEGATIVE, 2.5: FRACTION, True: TRUE}.get(value, ())
    return any(fnmatch(key, pattern) and key.count(".") == pattern.count(".") for pattern in accepting)


def keys(settings: Mapping, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The paths of all keys, groups included."""
    for key, value in settings.items():
        yield (*path, key)
        if isinstance(value, dict):
            yield from keys(value, (*path, key))


def changed(config: Mapping, path: tuple[str, ...], *value: object) -> dict:
    """A copy of the config with another value at `path`, or without it."""
    copied = copy.deepcopy(dict(config))
    node = functools.reduce(lambda node, key: node[key], path[:-1], copied)
    if value:
        node[path[-1]] = value[0]
    else:
        del node[path[-1]]
    return copied


def error_of(check, config: Mapping) -> str | None:
    try:
        check(copy.deepcopy(dict(config)))
    except ValueError as error:  # ConfigError, CorpusError, RunFolderError: user_errors() prints each of them
        assert "\n" not in str(error)
        return str(error)
    return None


def check_sweep(config: Mapping) -> None:
    Settings.of(config["sweep"])


def choices(group: str) -> list[str]:
    return sorted(file.stem for file in (ROOT / "configs" / group).glob("*.yaml") if file.stem != "base")


CHECKS = {
    "train": checks.check,
    "preflight": checks.check,
    "evaluate": checks.check_evaluate,
    "generate": checks.check_generate,
    "show_pattern": checks.check_show_pattern,
    "sweep": check_sweep,
}
GROUPS = ("attention", "data", "data/tokenizer", "evaluation", "logger", "model", "optimizer", "trainer")
CASES = [("train", f"{group}={choice}") for group in GROUPS for choice in choices(group)]
CASES += [("sweep", f"sweep={choice}") for choice in choices("sweep")]
CASES += [
    ("evaluate", "recall=standard"),
    ("evaluate", "series=standard"),
    *((command, "") for command in CHECKS if command != "sweep"),
]

ALIKE = tuple(f"model={size}" for size in choices("model") if size not in ("tiny", "hf"))
"""Choices with the keys of model=tiny, under other numbers."""

LATER = ("data/tokenizer=saved", "model=hf", "attention=hf")
"""Choices with keys that a command fills in before the checks."""

NEEDED = {
    "data=files": ["data.path=kernels"],
    **{f"data={each}": ["data.path=kernels", "data.source.extensions=[.py]"] for each in ("genome", "strains")},
    "data=timeseries": ["data.path=docs"],
    "data=books": ["data.path=docs", "data.source.extensions=[.md]"],
    "data=hub": ["data.path=kernels"],
    "data=tokens": ["data.path=docs", "data.source.extensions=[.md]", "data/tokenizer=bytes"],
    "data/tokenizer=token_ids": ["data.tokenizer.vocabulary=257", "data.tokenizer.bos=256"],
    **{f"trainer={choice}": ["trainer.accelerator=cpu"] for choice in ("gpu", "ddp", "fsdp")},
    "evaluate": ["checkpoint=README.md"],
    "generate": ["checkpoint=README.md"],
}
"""What a case sets besides."""


def case(command: str, choice: str) -> tuple[dict, tuple[str, ...]]:
    """A config that passes the checks, and the group whose keys are changed; () for the keys outside of groups."""
    group = choice.partition("=")[0]
    if command == "sweep":
        with Composer([choice]) as composer:
            return {"sweep": OmegaConf.to_container(composer.master["sweep"], resolve=True)}, ("sweep",)
    overrides = [*NEEDED.get(command, ()), *NEEDED.get(choice, ()), *([choice] if choice else ())]
    return compose(*overrides, config_name=command), tuple(filter(None, group.split("/")))


@pytest.mark.parametrize(("command", "choice"), [c for c in CASES if c[1] not in (*LATER, *ALIKE)])
def test_every_key_accepts_a_value_with_a_meaning_or_is_named(command, choice):
    check, (config, group) = CHECKS[command], case(command, choice)
    assert error_of(check, config) is None
    paths = [path for path in keys(config) if (path[: len(group)] == group if group else len(path) == 1)]
    # What a sweep varies is checked where its jobs are composed.
    paths = [path for path in paths if path != ("sweep",) and path[:2] != ("sweep", "vary")]
    assert paths
    for path in paths:
        dotted, default = ".".join(path), functools.reduce(lambda node, key: node[key], path, config)
        for value in WRONG:
            if isinstance(default, dict) and isinstance(value, dict):
                continue
            error = error_of(check, changed(config, path, value))
            if (choice, dotted, value) in EXCEPTIONS:
                continue
            if has_meaning(dotted if group else f"{command}/{dotted}", value):
                assert error is None, f"{dotted}={value!r} is refused: {error}"
            else:
                assert error is not None, f"{dotted}={value!r} is accepted"
                named = repr(path[-1]) if path[:-1] == ("attention", "patterns") else dotted  # by the schedule
                assert named in error or dotted in error, f"{dotted}={value!r}: {error}"
        if isinstance(default, dict) and not dotted.endswith((".patterns", ".tasks")):
            error = error_of(check, changed(config, (*path, "nonsense"), 1))
            assert error is not None and f"{dotted}.nonsense=1: must be left out" in error, f"{dotted}: {error}"
        if not {"patterns", "tasks"} & set(path) and not {dotted, (choice, dotted)} & {*OPTIONAL, *EARLIER}:
            error = error_of(check, changed(config, path))
            assert error is not None and f"{dotted}: missing" in error, f"without {dotted}: {error}"


@pytest.mark.parametrize(
    ("group", "key", "names"),
    [
        (schema.Attention, "backend", ("auto", *BACKENDS)),
        (schema.Attention, "block", BLOCK_SIZES),
        (schema.Model, "rope_scaling", ROPE_SCALINGS),
        (schema.Data, "packing", PACKINGS),
        (schema.Trainer, "on_nan", ON_NAN),
        (schema.Trainer, "fp8", (False, *FP8)),
        (schema.Protocol, "name", NAMES),
        (schema.Evaluation, "split", SPLITS),
        (schema.Probe, "split", SPLITS),
        (schema.Probe, "measure", MEASURES),
    ],
)
def test_a_key_accepts_the_names_that_its_package_implements(group, key, names):
    assert typing.get_args(group.model_fields[key].annotation) == tuple(names)

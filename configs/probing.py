"""The probe that a composed config of scripts/probe.py describes: which layers of a dense run need full attention.

probe.json: {"checkpoint", "documents_from", "documents_digest", "precision", "pattern", "chunks", "documents",
"tokens", "longest", "dense_loss", "dense_loss_low", "dense_loss_high", "units": [{"layer", "head", "change", "low",
"high", "by_position": [Change], "mass": [share of attention by octave of distance]}], "mass_edges", "near",
"schedules": [KeptSchedule], "tolerance", "recommended", "overrides", "loss_unit"}. `near`: the distance in tokens
beyond which the table counts attention. `recommended`: the number of units kept. `overrides`: those for train.py.
`loss_unit`: nats per token, or of series nats per value.
"""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from configs.build import build_plan
from configs.errors import ConfigError, as_override, refused
from configs.runs import Run, units_on
from data import InMemoryDocuments
from data.corpus import Split
from data.in_memory import digest
from data.units import LOSS
from kernels.patterns import Dense
from model.config import MODEL_ROPE, Rope
from model.evaluation.distance_mass import near_distance, octave_edges
from model.evaluation.layer_probe import ProbeLosses, chunks_to_probe, layer_passes, probe_units, schedule_losses
from model.evaluation.layer_schedules import (
    Change,
    by_document,
    change_of,
    changes_by_position,
    counts_to_measure,
    recommend,
    schedules,
)
from model.evaluation.loss_store import LossStore, fingerprint
from model.evaluation.replacement import Replacement, Unit, first_sparse_layer, units_of
from model.evaluation.scorer import ProgressBar
from model.evaluation.scoring import Work
from model.evaluation.statistics import mean_and_bounds
from model.precision import autocast

FOLDER = "probe.partial"
"""Folder beside the result that holds losses until the result is written."""


def build_replacement(attention: Mapping[str, Any]) -> Replacement:
    """Returns the one pattern of a composed `attention` group that is not dense, in place of dense attention.

    Raises:
        ConfigError: a pattern is refused, or none or several are not dense.
    """
    plan = build_plan(attention)
    dense = [name for name, pattern in plan.patterns.items() if isinstance(pattern, Dense)]
    sparse = [name for name in plan.patterns if name not in dense]
    if len(sparse) != 1:
        accepted = "one pattern that is not dense, and dense ones, as those of attention=window_dense or hierarchical"
        raise refused("attention.patterns", list(plan.patterns), accepted)
    name = dense[0] if dense else "full" if sparse != ["full"] else "dense"
    patterns = {**plan.patterns, name: plan.patterns.get(name, Dense())}
    return Replacement(replace(plan, patterns=patterns, schedule=[name]), name, sparse[0])


def check_probed(run: Run, length: int | None) -> int:
    """Checks that all layers of a run are dense and have the same rotary embeddings, and returns the length of chunks:
    `length`, or that of the training sequences."""
    layer = first_sparse_layer(run.model)
    if layer is not None:
        accepted = (
            f"a run whose layers are all dense; layer {layer} has attention.patterns.{run.model.plan.entry(layer)}"
        )
        raise refused("checkpoint", str(run.checkpoint), accepted)
    ropes = list(dict.fromkeys(run.model.plan.rope_of(layer) for layer in range(run.model.config.layers)))
    if len(ropes) > 1:
        accepted = f"a run whose layers have the same rotary embeddings; these have rope={', '.join(map(str, ropes))}"
        raise refused("checkpoint", str(run.checkpoint), accepted)
    limit = run.model.config.max_length
    if (length or run.sequence_length) > limit:
        raise refused("length", length or run.sequence_length, f"at most the model's model.max_length={limit}")
    return length or run.sequence_length


def check_replacement(run: Run, replacement: Replacement, units: Sequence[Unit], config: Mapping[str, Any]) -> None:
    """Checks that the pattern can replace that of a unit without parameters that the run lacks."""
    try:
        replacement.model(run.model, units, [unit for unit in units if unit.head != units[0].head])
    except ValueError as error:
        if config["per_head"] and not replacement.pattern.is_mask:
            raise ConfigError(f"per_head=true: must be false with this pattern: {error}") from None
        key, value = f"attention.patterns.{replacement.sparse}", config["attention"]["patterns"][replacement.sparse]
        raise ConfigError(f"{key}={as_override(value)}: {error}") from None


def probe_run(
    run: Run,
    documents: Split | InMemoryDocuments,
    name: str,
    config: Mapping[str, Any],
    overrides: Sequence[str],
    folder: Path,
    progress_bar: ProgressBar,
) -> tuple[dict[str, Any], LossStore]:
    """Returns the content of probe.json, and the store of losses, to be deleted when the content is written.

    Args:
        name: that of the documents.
        config: the composed config of scripts/probe.py.
        overrides: those of the command line, for the `overrides` of the result.
        folder: that of the result; until the result is written, it also holds the losses.

    Raises:
        ConfigError: the run, the pattern or the documents cannot be probed.
    """
    replacement = build_replacement(config["attention"])
    units = units_of(run.model, config["per_head"])
    length = check_probed(run, config["length"])
    check_replacement(run, replacement, units, config)
    work = chunks_to_probe(documents, length, config["tokens"], replacement)
    if not work:
        longest = max(len(documents.tokens(document)) for document in range(len(documents)))
        key = f"data.path={name}" if config.get("data") else f"split={name}"
        value = as_override(config["attention"]["patterns"][replacement.sparse])
        sees = f"than attention.patterns.{replacement.sparse}={value} sees"
        if longest > length:
            raise ConfigError(f"length={length}: must be more tokens {sees}; the longest document has {longest}")
        raise ConfigError(f"{key}: must hold documents of more tokens {sees}; the longest has {longest}")
    sizes = [segment.stop - segment.start for _, segment in work]
    named = ("attention", "per_head", "tokens", "tokens_at_once", "queries", "seed", "precision")
    settings = {"probe": {key: config[key] for key in named}, "length": length}
    store = LossStore(folder / FOLDER / fingerprint(run.checkpoint, documents, settings))
    inputs = (run.model, replacement, documents, work, units)
    shared = {"tokens_at_once": config["tokens_at_once"], "store": store}
    layers = run.model.config.layers
    with autocast(run.model, config["precision"]):
        total = sum(sizes) * layer_passes(layers, units)
        with progress_bar(f"{run.label}, one change at a time", total) as progress:
            found = probe_units(*inputs, queries=config["queries"], seed=config["seed"], progress=progress, **shared)
        changes = {unit: change_of(losses, found.dense, work) for unit, losses in found.changed.items()}
        counts = counts_to_measure(len(units), config["measure"])
        with progress_bar(f"{run.label}, schedules", sum(sizes) * layers * (len(counts) - 1)) as progress:

            def measure(kept: Sequence[Unit]) -> Change:
                dense = len(kept) == len(units)
                losses = found.dense if dense else schedule_losses(*inputs, kept, progress=progress, **shared)
                return change_of(losses, found.dense, work)

            kept = schedules(run.model, replacement, changes, counts, max(sizes), measure)
    chosen = recommend(kept, config["tolerance"])
    dense_loss, low, high = mean_and_bounds(by_document(found.dense, work))
    result = {
        "checkpoint": str(run.checkpoint.absolute().relative_to(run.folder)),
        "documents_from": name,
        "documents_digest": digest(documents),
        "precision": config["precision"],
        "pattern": {replacement.sparse: config["attention"]["patterns"][replacement.sparse]},
        "chunks": len(work),
        "documents": len({document for document, _ in work}),
        "tokens": sum(sizes),
        "longest": max(sizes),
        "dense_loss": dense_loss,
        "dense_loss_low": low,
        "dense_loss_high": high,
        "units": [_unit_row(unit, changes[unit], found, work) for unit in units],
        "mass_edges": octave_edges(max(sizes)),
        "near": near_distance(replacement.pattern, max(sizes)),
        "schedules": [asdict(each) for each in kept],
        "tolerance": config["tolerance"],
        "recommended": chosen.kept,
        "overrides": training_overrides(
            config["attention"], overrides, replacement, chosen.schedule, run.model.plan.rope_of(0)
        ),
        "loss_unit": units_on(run, config.get("data"))[LOSS],
    }
    return result, store


def _unit_row(unit: Unit, change: Change, found: ProbeLosses, work: Sequence[Work]) -> dict[str, Any]:
    heads = found.mass[unit.layer]
    by_position = changes_by_position(found.changed[unit], found.dense, work)
    return {
        "layer": unit.layer,
        "head": unit.head,
        "change": change.change,
        "low": change.low,
        "high": change.high,
        "by_position": [asdict(each) for each in by_position],
        "mass": (heads.mean(0) if unit.head is None else heads[unit.head]).tolist(),
    }


def training_overrides(
    attention: Mapping[str, Any],
    overrides: Sequence[str],
    replacement: Replacement,
    schedule: Sequence[str | list[str]],
    rope: Rope,
) -> str:
    """Returns the overrides that give train.py the patterns of the probe and `schedule`, quoted for a shell. `rope`:
    the rotary embeddings of the run's layers."""
    own = [each for each in overrides if each.lstrip("+~").startswith("attention.")]
    dense = replacement.dense
    added = [] if attention["patterns"].get(dense) else [f"+attention.patterns.{dense}._target_=kernels.patterns.Dense"]
    if rope != MODEL_ROPE:
        for name in (dense, replacement.sparse):
            plus = "" if "rope" in attention["patterns"].get(name, {}) else "+"
            added.append(f"{plus}attention.patterns.{name}.rope={rope}")
    return shlex.join(
        [f"attention={attention['name']}", *own, *added, f"attention.schedule={as_override(list(schedule))}"]
    )

"""Changes of the loss with their intervals, and schedules that keep the most important layers dense."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import torch

from model.decoding.cache import expected_bytes
from model.evaluation.replacement import Replacement, Unit, with_plan
from model.evaluation.scoring import Work
from model.evaluation.statistics import mean_and_bounds
from model.transformer import Transformer

MEASURES = ("octaves", "all")
"""Which schedules are measured: those that keep 0, 1, 2, 4, ... and all units, or every one."""

OCTAVES = 6
"""Ranges of positions into which a loss change is split: the last is half of the longest chunk's range."""


@dataclass(frozen=True)
class Change:
    """Loss minus that of dense attention, nats per token, over the tokens at positions `[start, stop)` of their chunks.
    `low` and `high` are 95 % bounds over documents, None if there is one document."""

    start: int
    stop: int
    tokens: int
    change: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class KeptSchedule:
    """A schedule that keeps `kept` units dense, those with the largest loss changes.

    predicted: the sum of the loss changes of the other units. measured: the loss change; None if it was not measured.
    attention_flops: training FLOPs of attention in one document of the longest chunk's length. cache_bytes, read_bytes:
    bytes of keys and values that a cache stores after such a document, and that the next token reads.
    """

    kept: int
    schedule: list[str | list[str]]
    predicted: float
    measured: Change | None
    attention_flops: int
    cache_bytes: int
    read_bytes: int


def change_of(
    losses: Sequence[np.ndarray],
    dense: Sequence[np.ndarray],
    work: Sequence[Work],
    start: int = 0,
    stop: int | None = None,
) -> Change:
    """Returns the change of `losses` against `dense`, both one array per chunk of `work`, paired by document."""
    differences = [(changed - before)[start:stop] for changed, before in zip(losses, dense, strict=True)]
    paired, longest = by_document(differences, work), max(map(len, dense))
    return Change(start, min(stop or longest, longest), sum(map(len, paired)), *mean_and_bounds(paired))


def by_document(chunks: Sequence[np.ndarray], work: Sequence[Work]) -> list[np.ndarray]:
    """Joins the values of the chunks of each document."""
    joined: dict[int, list[np.ndarray]] = {}
    for (document, _), values in zip(work, chunks, strict=True):
        joined.setdefault(document, []).append(values)
    return [np.concatenate(values) for values in joined.values()]


def changes_by_position(
    losses: Sequence[np.ndarray], dense: Sequence[np.ndarray], work: Sequence[Work]
) -> list[Change]:
    """Returns the change in every range of `position_edges`."""
    edges = position_edges(max(map(len, dense)))
    return [change_of(losses, dense, work, start, stop) for start, stop in pairwise(edges)]


def position_edges(longest: int) -> list[int]:
    """Returns the edges of at most OCTAVES ranges of positions: 0, ..., a quarter, half and all of the power of two
    that no position exceeds."""
    top = (longest - 1).bit_length()
    return [0, *(2**power for power in range(max(0, top - OCTAVES + 1), top + 1))]


def rank(changes: dict[Unit, Change]) -> list[Unit]:
    """Returns the units by falling change of the loss; of equal ones, the first layer first."""
    return sorted(changes, key=lambda unit: -changes[unit].change)


def counts_to_measure(units: int, measure: str) -> list[int]:
    """Returns the numbers of kept units whose schedules are measured; `measure` is one of MEASURES."""
    if measure == "all":
        return list(range(units + 1))
    return sorted({0, units, *(2**power for power in range(units.bit_length()) if 2**power < units)})


def schedules(
    model: Transformer,
    replacement: Replacement,
    changes: dict[Unit, Change],
    counts: Sequence[int],
    length: int,
    measure: Callable[[Sequence[Unit]], Change],
) -> list[KeptSchedule]:
    """Returns the schedules that keep 0, 1, ... and all units dense.

    Args:
        counts: the numbers of kept units whose loss `measure` returns; it is given the kept units.
        length: tokens of the document whose cost is counted.
    """
    ranked, units, found = rank(changes), list(changes), []
    costs: dict[str | tuple[str, ...], np.ndarray] = {}  # of a layer, by its entry in the schedule
    for count in range(len(units) + 1):
        kept = ranked[:count]
        schedule = replacement.schedule(units, kept)
        entries = [entry if isinstance(entry, str) else tuple(entry) for entry in schedule]
        for entry in set(entries) - set(costs):
            costs[entry] = _layer_cost(with_plan(model, replace(replacement.plan, schedule=[entry])), length)
        flops, stored, read = map(int, sum(costs[entry] for entry in entries))
        predicted = sum(changes[unit].change for unit in ranked[count:])
        measured = measure(kept) if count in counts else None
        found.append(KeptSchedule(count, schedule, predicted, measured, flops, stored, read))
    return found


def _layer_cost(model: Transformer, length: int) -> np.ndarray:
    """Returns training FLOPs, cached bytes and read bytes of a layer of a model whose layers have one pattern."""
    device = model.embed_tokens.weight.device.type
    number = torch.get_autocast_dtype(device).itemsize if torch.is_autocast_enabled(device) else None
    flops = model.cost(model.build_layouts(None, length)).attention.flops
    return np.array([flops, *expected_bytes(model, length, batch=1, number=number)]) // model.config.layers


def recommend(found: Sequence[KeptSchedule], tolerance: float) -> KeptSchedule:
    """Returns the measured schedule that keeps the fewest units and loses at most `tolerance` nats per token."""
    good = (each for each in found if each.measured is not None and each.measured.change <= tolerance)
    return next(good)  # the dense one loses nothing

"""The scaling sweep: a law of loss and compute for each pattern, and its prediction for the largest budget.

The points of a pattern are, at each budget, the best size's quality: bits per byte of text. The largest budget is
held out: no fit uses its runs. scaling_law.py has the law and the resampling behind the intervals, scaling_text.py the
words.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import NamedTuple

import numpy as np

from data.units import BITS, OF_TEXT
from scripts.reporting.jobs import Job, Sweep, same_text
from scripts.reporting.scaling_law import FREE_OFFSET, LEAST_BUDGETS, Interval, PowerLaw, Resampling, fit_power_law

GRID = 60
"""Budgets at which a figure draws a law."""


@dataclass(frozen=True)
class Point:
    """The best size of a pattern at one budget."""

    flops: float
    loss: float  # in the unit of the quality
    parameters: float
    at_edge: bool  # whether no smaller or no larger size ran


@dataclass(frozen=True)
class Fit:
    """The law of one pattern. Losses are in the unit of the quality."""

    pattern: str
    baseline: bool
    points: tuple[Point, ...]  # of the fitted budgets, ascending
    held_out: Point | None
    exponent: Interval
    offset: Interval | None  # None where too few budgets determine it
    predicted: Interval  # at the held-out budget, on these documents
    difference: Interval | None  # measured minus predicted, on the same documents
    multiplier: Interval | None  # FLOPs that dense needs for this law's loss at the largest fitted budget, over it
    curve: tuple[tuple[float, Interval], ...] = field(repr=False)  # (FLOPs, loss), up to the held-out budget

    @property
    def inside(self) -> bool | None:
        """Whether the interval of the difference contains 0; None where it is unknown."""
        if self.difference is None or self.difference.low is None:
            return None
        return self.difference.low <= 0 <= self.difference.high


@dataclass(frozen=True)
class Scaling:
    """The fits of one sweep; none where `refused` gives the reason."""

    sweep: str
    held_out: float  # FLOPs
    quality: str = BITS  # the number whose law it is
    unit: str = OF_TEXT[BITS]
    fits: tuple[Fit, ...] = ()
    missing: tuple[str, ...] = ()  # jobs without results
    refused: tuple[str, ...] = ()
    seeds: int = 1  # fewest seeds of a pattern and size at one budget
    steps: float | None = None  # of the shortest run; its FLOPs are within half a step of the budget


def is_scaling(sweep: Sweep) -> bool:
    return len({job.flops for job in sweep.jobs if job.flops is not None}) > 1


def at_largest_budget(sweep: Sweep) -> Sweep:
    """Returns a scaling sweep with the jobs of its largest budget, which can be compared; any other sweep as it is."""
    if not is_scaling(sweep):
        return sweep
    largest = max(job.flops for job in sweep.jobs if job.flops is not None)
    return replace(sweep, jobs=tuple(job for job in sweep.jobs if job.flops == largest))


def fit_sweep(sweep: Sweep) -> Scaling:
    """Fits a law for each pattern of a scaling sweep, and for its control, to the jobs that are done."""
    jobs = [job for job in sweep.jobs if job.flops is not None]
    held_out = max(job.flops for job in jobs)
    missing = tuple(f"{job.label}, seed {job.seed} ({job.state})" for job in jobs if not job.counted)
    done = [job for job in jobs if job.counted]
    units = list({(job.quality, job.units[job.quality]): None for job in done or jobs})
    if len(units) > 1:
        different = f"the jobs' losses have different units: {', '.join(unit for _, unit in units)}"
        return Scaling(sweep.name, held_out, missing=missing, refused=(different,))
    (named,) = units
    if not same_text(done):
        refused = ("the jobs were evaluated on different text",)
        return Scaling(sweep.name, held_out, *named, missing=missing, refused=refused)
    resampling = _resampling(done)
    fits, refused, dense = [], [], None
    for pattern in sorted(dict.fromkeys(job.pattern for job in jobs), key=lambda name: not _is_baseline(name, jobs)):
        own = [job for job in done if job.pattern == pattern]
        found = _frontier(own, resampling)
        fitted = [flops for flops in sorted(found) if flops < held_out]
        if len(fitted) < LEAST_BUDGETS:
            refused.append(
                f"{pattern} has results at {len(fitted)} of the budgets below the largest, and needs {LEAST_BUDGETS}"
            )
            continue
        losses = np.stack([found[flops].losses for flops in fitted], 1)
        law = fit_power_law(np.array(fitted), losses)
        if _is_baseline(pattern, jobs):
            dense = law
        interval = partial(Interval.of, levels=resampling.levels if resampling else (0.0, 1.0))
        fits.append(_fit(pattern, _is_baseline(pattern, jobs), found, fitted, held_out, law, dense, interval))
    seeds = min((len(each) for each in _by_setting(done).values()), default=1)
    steps = min((steps for job in done if (steps := job.number("step"))), default=None)
    return Scaling(sweep.name, held_out, *named, tuple(fits), missing, tuple(refused), seeds, steps)


class Best(NamedTuple):
    """The best size of a pattern at one budget."""

    point: Point
    losses: np.ndarray  # [resamples]: of the size that is best in each resample
    on_documents: np.ndarray  # [resamples]: of the point's size, with each of its seeds once


def _fit(
    pattern: str,
    baseline: bool,
    found: Mapping[float, Best],
    fitted: Sequence[float],
    held_out: float,
    law: PowerLaw,
    dense: PowerLaw | None,
    interval: Callable[[np.ndarray], Interval],
) -> Fit:
    predicted, difference, multiplier = law.loss(held_out), None, None
    # Harder documents raise all points alike. Without that, intervals are those of the law on these documents.
    level = np.mean([found[flops].on_documents for flops in fitted], 0)
    level -= level[0]
    if held_out in found:
        difference = interval(found[held_out].losses - predicted)
    if dense is not None and not baseline:
        multiplier = interval(dense.flops(law.loss(fitted[-1])) / fitted[-1])
    return Fit(
        pattern=pattern,
        baseline=baseline,
        points=tuple(found[flops].point for flops in fitted),
        held_out=found[held_out].point if held_out in found else None,
        exponent=interval(law.exponent),
        offset=interval(law.offset) if len(fitted) >= FREE_OFFSET else None,
        predicted=interval(predicted - level),
        difference=difference,
        multiplier=multiplier,
        curve=tuple((float(c), interval(law.loss(c) - level)) for c in np.geomspace(fitted[0], held_out, GRID)),
    )


def _frontier(jobs: Sequence[Job], resampling: Resampling | None) -> dict[float, Best]:
    """Returns the best size at each budget. Each resample chooses its own, so intervals include the choice."""
    result = {}
    for flops in dict.fromkeys(job.flops for job in jobs):
        sizes = list(_by_setting([job for job in jobs if job.flops == flops]).values())  # the seeds of each
        parameters = [seeds[0].number("parameters") or 0.0 for seeds in sizes]
        found = [_losses(seeds, resampling) for seeds in sizes]
        best = int(np.argmin([losses[0] for losses, _ in found]))
        edge = parameters[best] in (min(parameters), max(parameters))
        losses, on_documents = found[best]
        point = Point(flops, float(losses[0]), parameters[best], edge)
        result[flops] = Best(point, np.min([losses for losses, _ in found], 0), on_documents)
    return result


def _losses(seeds: Sequence[Job], resampling: Resampling | None) -> tuple[np.ndarray, np.ndarray]:
    """Returns the quality `[resamples]` of a setting over drawn documents and seeds, and over drawn documents."""
    if resampling is None:
        mean = np.array([np.mean([job.number(job.quality) for job in seeds])])
        return mean, mean
    nats = np.array([job.evaluation["by_document"]["nats"] for job in seeds])
    return resampling.quality(nats), resampling.on_documents(nats).mean(1)


def _size_of(job: Job) -> str:
    """Returns the settings that are neither the attention's nor the seed nor the budget, as overrides."""
    return " ".join(text for text in job.context.split(" ") if not text.startswith("sweep.flops="))


def _by_setting(jobs: Sequence[Job]) -> dict[tuple[str, float, str], list[Job]]:
    """Returns {(pattern, FLOPs, size): its seeds}."""
    result: dict[tuple[str, float, str], list[Job]] = {}
    for job in jobs:
        result.setdefault((job.pattern, job.flops, _size_of(job)), []).append(job)
    return result


def _is_baseline(pattern: str, jobs: Sequence[Job]) -> bool:
    return any(job.baseline for job in jobs if job.pattern == pattern)


def _resampling(jobs: Sequence[Job]) -> Resampling | None:
    """Returns None where a job has no losses of several documents: there are no intervals then."""
    found = [job.sizes_of_documents() for job in jobs]
    if not found or None in found or len(found[0]) < 2:
        return None
    return Resampling(np.array(found[0], dtype=float), np.log(2) if jobs[0].quality == BITS else 1.0)

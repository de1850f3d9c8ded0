"""The scaling sweep: a law of loss and compute for each pattern, and its prediction for the largest budget.

The points of a pattern are, at each budget, the best size's bits per byte. The largest budget is held out: no fit uses
its runs. scaling_law.py has the law and the resampling behind the intervals.
"""

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from scripts.reporting.aggregate import QUALITY
from scripts.reporting.jobs import Job, Sweep
from scripts.reporting.manifest import PATTERN
from scripts.reporting.scaling_law import FREE_OFFSET, LEAST_BUDGETS, Interval, PowerLaw, Resampling, fit_power_law
from scripts.reporting.table import signed, significant

NAMED = 6
"""Largest number of missing jobs that a report names; its lists of jobs have all of them."""

GRID = 60
"""Budgets at which a figure draws a law."""


@dataclass(frozen=True)
class Point:
    """The best size of a pattern at one budget."""

    flops: float
    loss: float  # bits per byte
    parameters: float | None
    at_edge: bool  # whether it is the smallest or the largest size that ran, of at least three


@dataclass(frozen=True)
class Fit:
    """The law of one pattern. Losses are in bits per byte."""

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
    fits: tuple[Fit, ...] = ()
    missing: tuple[str, ...] = ()  # jobs without results
    refused: tuple[str, ...] = ()
    seeds: int = 1  # fewest seeds of a point


def is_scaling(sweep: Sweep) -> bool:
    return len({job.flops for job in sweep.jobs if job.flops is not None}) > 1


def at_largest_budget(sweep: Sweep) -> Sweep:
    """Returns a scaling sweep with the jobs of its largest budget, which can be compared; any other sweep as it is."""
    if not is_scaling(sweep):
        return sweep
    largest = max(job.flops for job in sweep.jobs if job.flops is not None)
    return replace(sweep, jobs=tuple(job for job in sweep.jobs if job.flops == largest))


def fit_sweep(sweep: Sweep) -> Scaling:
    """Fits a law for each pattern of a scaling sweep to the jobs that are done."""
    jobs = [job for job in sweep.jobs if job.flops is not None and job.role == PATTERN]
    held_out = max(job.flops for job in jobs)
    missing = tuple(f"{job.label}, seed {job.seed} ({job.state})" for job in jobs if not job.counted)
    done = [job for job in jobs if job.counted]
    if len({_text_of(job) for job in done}) > 1:
        return Scaling(sweep.name, held_out, missing=missing, refused=("the jobs were evaluated on different text",))
    resampling = _resampling(done)
    fits, refused, dense = [], [], None
    for pattern in sorted(dict.fromkeys(job.pattern for job in jobs), key=lambda name: not _is_baseline(name, jobs)):
        own = [job for job in done if job.pattern == pattern]
        found = _frontier(own, resampling)
        fitted = [flops for flops in sorted(found) if flops < held_out]
        if len(fitted) < LEAST_BUDGETS:
            refused.append(f"{pattern} has results at {len(fitted)} of the budgets below the largest, and needs 2")
            continue
        losses = np.stack([found[flops][1] for flops in fitted], 1)
        law = fit_power_law(np.array(fitted), losses)
        if _is_baseline(pattern, jobs):
            dense = law
        fits.append(_fit(pattern, _is_baseline(pattern, jobs), found, fitted, held_out, law, dense))
    seeds = min((len(each) for each in _by_setting(done).values()), default=1)
    return Scaling(sweep.name, held_out, tuple(fits), missing, tuple(refused), seeds)


Frontier = dict[float, tuple[Point, np.ndarray]]
"""{FLOPs: (the best size, bits per byte of the best size in each resample)}."""


def _fit(
    pattern: str,
    baseline: bool,
    found: Frontier,
    fitted: Sequence[float],
    held_out: float,
    law: PowerLaw,
    dense: PowerLaw | None,
) -> Fit:
    predicted, difference, multiplier = law.loss(held_out), None, None
    # Harder documents raise all points alike. Without that, intervals are those of the law on these documents.
    level = np.mean([found[flops][1] for flops in fitted], 0)
    level -= level[0]
    if held_out in found:
        difference = Interval.of(found[held_out][1] - predicted)
    if dense is not None and not baseline:
        multiplier = Interval.of(dense.flops(law.loss(fitted[-1])) / fitted[-1])
    return Fit(
        pattern=pattern,
        baseline=baseline,
        points=tuple(found[flops][0] for flops in fitted),
        held_out=found[held_out][0] if held_out in found else None,
        exponent=Interval.of(law.exponent),
        offset=Interval.of(law.offset) if len(fitted) >= FREE_OFFSET else None,
        predicted=Interval.of(predicted - level),
        difference=difference,
        multiplier=multiplier,
        curve=tuple((float(c), Interval.of(law.loss(c) - level)) for c in np.geomspace(fitted[0], held_out, GRID)),
    )


def _frontier(jobs: Sequence[Job], resampling: Resampling | None) -> Frontier:
    """Returns the best size at each budget. Each resample chooses its own, so intervals include the choice."""
    groups = _by_setting(jobs)

    def parameters(size: str) -> float | None:
        return next((job.number("parameters") for job in jobs if size_of(job) == size), None)

    sizes = sorted(
        dict.fromkeys(size for _, _, size in groups),
        key=lambda size: parameters(size) or 0.0,
    )
    result = {}
    for flops in dict.fromkeys(flops for _, flops, _ in groups):
        tried = [size for size in sizes if any(key[1:] == (flops, size) for key in groups)]
        losses = []
        for size in tried:
            (own,) = (each for key, each in groups.items() if key[1:] == (flops, size))
            if resampling is None:
                losses.append(np.array([np.mean([job.number(QUALITY) for job in own])]))
            else:
                losses.append(resampling.bits_per_byte(np.array([_by_document(job)["nats"] for job in own])))
        best = int(np.argmin([loss[0] for loss in losses]))
        edge = len(tried) > 2 and best in (0, len(tried) - 1)
        result[flops] = Point(flops, float(losses[best][0]), parameters(tried[best]), edge), np.min(losses, 0)
    return result


def size_of(job: Job) -> str:
    """Returns the settings that are neither the attention's nor the seed nor the budget, as overrides."""
    return " ".join(text for text in job.context.split(" ") if not text.startswith("sweep.flops="))


def _by_setting(jobs: Sequence[Job]) -> dict[tuple[str, float, str], list[Job]]:
    """Returns {(pattern, FLOPs, size): its seeds}."""
    result: dict[tuple[str, float, str], list[Job]] = {}
    for job in jobs:
        result.setdefault((job.pattern, job.flops, size_of(job)), []).append(job)
    return result


def _is_baseline(pattern: str, jobs: Sequence[Job]) -> bool:
    return any(job.baseline for job in jobs if job.pattern == pattern)


def _by_document(job: Job) -> dict | None:
    return (job.evaluation or {}).get("by_document")


def _text_of(job: Job) -> tuple:
    """Returns what identifies the text on which a job was evaluated."""
    row = job.evaluation or {}
    return tuple(str(row.get(key)) for key in ("documents_digest", "documents_from", "documents", "bytes"))


def _resampling(jobs: Sequence[Job]) -> Resampling | None:
    """Returns None where a job has no losses by document: there are no intervals then."""
    found = [_by_document(job) for job in jobs]
    if not found or None in found:
        return None
    return Resampling(np.array(found[0]["bytes"], dtype=float))


READING = (
    "Each point is the best size of a pattern at one budget of training FLOPs. The lines are the laws that the filled "
    "points give, with 95 % intervals over documents and seeds. The hollow points are the largest budget, which no law "
    "uses."
)

HEADER = (
    "pattern",
    "exponent",
    "E (bits/byte)",
    "predicted (bits/byte)",
    "measured",
    "measured minus predicted",
    "FLOPs of dense for the same loss",
)


def heading(scaling: Scaling, count: int) -> str:
    """Returns the title of a sweep's table among `count` of them."""
    return "Scaling laws" + (f": {scaling.sweep}" if count > 1 else "")


def write_scaling_csv(scalings: Sequence[Scaling]) -> str:
    """Returns the points of all fits in full precision."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("sweep", "pattern", "flops", "parameters", "bits_per_byte", "held_out"))
    for scaling in scalings:
        for fit in scaling.fits:
            for point in filter(None, (*fit.points, fit.held_out)):
                numbers = (point.flops, point.parameters, point.loss, point is fit.held_out)
                writer.writerow((scaling.sweep, fit.pattern, *numbers))
    return text.getvalue()


def table_of(scaling: Scaling) -> list[tuple[str, ...]]:
    """Returns the rows below HEADER."""
    return [
        (
            fit.pattern,
            _bounded(fit.exponent, "{:.4f}"),
            "0 (not fitted)" if fit.offset is None else _bounded(fit.offset, "{:.4f}"),
            _bounded(fit.predicted, "{:.4f}"),
            f"{fit.held_out.loss:.4f}" if fit.held_out else "missing",
            _difference(fit),
            "1 (baseline)" if fit.baseline else "" if fit.multiplier is None else _times(fit.multiplier),
        )
        for fit in scaling.fits
    ]


def sentences(scaling: Scaling) -> list[str]:
    """Returns the findings of a scaling sweep, most important first."""
    result = []
    for fit in scaling.fits:
        told = (
            f"{fit.pattern}, best of its sizes: the law of {len(fit.points)} budgets up to {fit.points[-1].flops:.3g} "
            f"FLOPs predicts {fit.predicted.value:.4f} bits per byte at {scaling.held_out:.3g} FLOPs; "
        )
        if fit.held_out is None:
            told += "that budget is not measured yet"
        elif fit.difference.low is None:
            told += f"measured is {fit.held_out.loss:.4f}"
        else:
            told += (
                f"measured is {fit.held_out.loss:.4f}, {'inside' if fit.inside else 'outside'} the interval (measured "
                f"minus predicted {signed(fit.difference.value)}, 95 % interval {signed(fit.difference.low)} to "
                f"{signed(fit.difference.high)})"
            )
        result.append(f"{told}.")
    for fit in scaling.fits:
        if fit.multiplier is not None:
            wrong = any(each.inside is False for each in scaling.fits if each is fit or each.baseline)
            doubt = ", of which at least one misses the largest budget" if wrong else ""
            result.append(
                f"For the loss of {fit.pattern} at {fit.points[-1].flops:.3g} FLOPs, dense needs "
                f"{_times(fit.multiplier)} times as many FLOPs, by both laws{doubt}."
            )
    return result


def limits(scaling: Scaling) -> list[str]:
    """Returns what the fits do not show, and what they lack."""
    result = [f"No scaling law: {each}." for each in scaling.refused]
    if scaling.missing:
        more = f"; and {len(scaling.missing) - NAMED} more" if len(scaling.missing) > NAMED else ""
        result.append(f"The scaling laws lack the results of {'; '.join(scaling.missing[:NAMED])}{more}.")
    if not scaling.fits:
        return result
    if scaling.fits[0].predicted.low is None:
        result.append("The scaling laws have no intervals: not every job has losses by document.")
    elif scaling.seeds < 2:
        result.append(
            "The intervals of the scaling laws are over documents alone: with one seed they do not contain the noise "
            "of training."
        )
    if any(fit.offset is None for fit in scaling.fits):
        result.append(
            f"With fewer than {FREE_OFFSET} fitted budgets the law has no loss that compute cannot remove (E): it "
            "predicts too low a loss far beyond the fitted budgets."
        )
    edges = [
        f"{fit.pattern} at {', '.join(f'{point.flops:.3g}' for point in points)} FLOPs"
        for fit in scaling.fits
        if (points := [p for p in (*fit.points, *filter(None, [fit.held_out])) if p.at_edge])
    ]
    if edges:
        result.append(
            f"The best size is the smallest or the largest one for {'; '.join(edges)}: another size may be "
            "better there, and the law of the best size another one."
        )
    return result


def _bounded(found: Interval, form: str) -> str:
    text = form.format(found.value)
    return text if found.low is None else f"{text} ({form.format(found.low)} to {form.format(found.high)})"


def _difference(fit: Fit) -> str:
    if fit.difference is None:
        return ""
    low, high = fit.difference.low, fit.difference.high
    bounds = "" if low is None else f" ({signed(low)} to {signed(high)}): {'inside' if fit.inside else 'outside'}"
    return signed(fit.difference.value) + bounds


def _times(found: Interval) -> str:
    """Returns the multiplier; a loss that dense never reaches by its law has no finite one."""

    def one(value: float) -> str:
        return "infinitely many" if np.isinf(value) else significant(value)

    return one(found.value) + ("" if found.low is None else f" ({one(found.low)} to {one(found.high)})")

"""Aggregates jobs to rows: means over seeds, differences to the dense baseline, and Pareto fronts.

Intervals are Student's, 95 %, over seeds, with half-width t(0.975, n - 1) s / sqrt(n). The difference of two rows is
paired by seed, over the seeds that both have: in a sweep of two stages, jobs of one seed start from the same weights,
and seeds often differ more than patterns do. Rows without a common seed have Welch's interval for unequal variances,
with the degrees of freedom rounded down. One seed has no interval; one over documents stands beside it.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from scipy import stats

from data.units import BITS, LOSS, OF_TEXT, Units, quality_in
from model.evaluation.comparison import bits_per_byte, per_token
from scripts.reporting.jobs import TOTALS, Job, Sweep, same_text
from scripts.reporting.manifest import CONTROL, FIRST_STAGE

COSTS = ("step_seconds", "attention_flops_per_token", "peak_memory_bytes")
"""The costs: each has a panel of quality against it, and a Pareto front."""

MEASURED = (
    *(BITS, LOSS),
    *COSTS,
    *("tokens_per_second", "density_pairs", "density_tiles", "flops_per_token", "train_tokens", "train_seconds"),
    *("parameters", "mfu_exact"),
    *TOTALS,
    *("cache_bytes", "decode_ms_per_token"),
)
"""Numbers of a job that rows aggregate over seeds. Rows with BITS do not have LOSS."""

TIMES = ("step_seconds", "tokens_per_second", "mfu_exact", "train_seconds", "total_seconds", "decode_ms_per_token")
"""Those of MEASURED that change if another job runs on the same device."""

CONFIDENCE = 0.95


Seeded = tuple[int | None, float]
"""(seed, number)."""


@dataclass(frozen=True)
class Estimate:
    """A mean over `count` seeds; `low` and `high` are its CONFIDENCE bounds, None for one seed."""

    mean: float
    low: float | None
    high: float | None
    count: int

    @property
    def half_width(self) -> float | None:
        return None if self.low is None else self.mean - self.low


@dataclass(frozen=True)
class Paired:
    """A mean difference of the quality. `low` and `high`: its 95 % bounds over the documents that both runs scored,
    None for one document."""

    mean: float
    low: float | None
    high: float | None
    documents: int
    better: int  # documents on which the first row is better


@dataclass(frozen=True)
class Row:
    """One pattern of one sweep, over its seeds."""

    sweep: str
    label: str
    baseline: bool
    jobs: tuple[Job, ...]
    values: Mapping[str, Estimate]  # keys of MEASURED, over the counted jobs
    fronts: frozenset[str] = frozenset()  # the costs on whose Pareto front the row is
    against: "Row | None" = field(default=None, repr=False)  # its dense baseline
    difference: Estimate | None = None  # of `quality` to `against`, over seeds: negative is better
    difference_paired: Paired | None = None  # the same over documents
    ratios: Mapping[str, float] = field(default_factory=dict)  # {cost: ratio to that of `against`}
    control: "Row | None" = field(default=None, repr=False)  # the baseline at short context
    over_control: Estimate | None = None  # `quality` minus that of `control`, over seeds
    over_control_paired: Paired | None = None  # the same over documents

    @property
    def counted(self) -> tuple[Job, ...]:
        return tuple(job for job in self.jobs if job.counted)

    @property
    def units(self) -> Units:
        """The units of the row's losses."""
        return self.example.units

    @property
    def quality(self) -> str:
        """The number by which the row is compared: BITS, or LOSS where there are no bits per byte."""
        return quality_in(self.units)

    @property
    def unit(self) -> str:
        """The unit of the row's quality."""
        return self.units[self.quality]

    def seeded(self, name: str) -> list[Seeded]:
        """Returns (seed, number) of the counted jobs, for a key of `values`."""
        if name not in self.values:
            return []
        return [(job.seed, number) for job in self.counted if (number := job.number(name)) is not None]

    @property
    def is_control(self) -> bool:
        return self.jobs[0].role == CONTROL

    @property
    def example(self) -> Job:
        """The job whose picture and config represent the row."""
        return next(iter(self.counted), self.jobs[0])

    @property
    def sequence_length(self) -> int | None:
        return self.example.setting("data", "sequence_length")


def quality_of(rows: Sequence[Row]) -> str:
    """Returns the number by which rows are compared: LOSS if no row has BITS, and BITS otherwise."""
    found = {row.quality for row in rows if row.quality in row.values} or {row.quality for row in rows}
    return LOSS if found == {LOSS} else BITS


def unit_in(rows: Sequence[Row], number: str) -> str:
    """Returns the unit of BITS or LOSS in rows, or their different units."""
    return " / ".join(dict.fromkeys(row.units[number] for row in rows if number in row.units)) or OF_TEXT[number]


def unit_of_quality(rows: Sequence[Row]) -> str:
    """Returns the unit of the number by which rows are compared, or their different units."""
    quality = quality_of(rows)
    return unit_in([row for row in rows if row.quality == quality], quality)


def make_rows(sweeps: Sequence[Sweep]) -> list[Row]:
    """Returns a row for every label of every sweep, in the order of their jobs. A label whose jobs have not finished
    has a row, too.

    First stages have no row, because they are not compared; their costs are part of the jobs' totals. Times of a sweep
    whose jobs shared a device are left out, because they do not compare.
    """
    untimed = {_place(sweep) for sweep in sweeps if not sweep.timed}
    grouped: dict[tuple[str, str, str], list[Job]] = {}
    for sweep in sweeps:
        for job in sweep.jobs:
            if job.role == FIRST_STAGE:
                continue
            grouped.setdefault((_place(sweep), sweep.name, job.label), []).append(job)
    places = {place: name for place, name, _ in grouped}
    rows = []
    for (place, name, label), jobs in grouped.items():
        alone = list(places.values()).count(name) == 1
        label += " (lossy tokenizer)" * any(job.lossy for job in jobs)
        counted = [job for job in jobs if job.counted]
        found = {
            key: over_seeds([(job.seed, n) for job in counted if (n := job.number(key)) is not None])
            for key in MEASURED
        }
        if found[BITS]:
            found[LOSS] = []
        if place in untimed:
            found |= {key: [] for key in TIMES}
        rows.append(
            Row(
                sweep=name,
                label=f"{(name if alone else place) or 'runs'}: {label}" if len(places) > 1 else label,
                baseline=any(job.baseline for job in jobs),
                jobs=tuple(jobs),
                values={key: estimate(numbers) for key, numbers in found.items() if numbers},
            )
        )
    return _compare_with_controls(_compare_with_baselines(_mark_fronts(rows)))


def _place(sweep: Sweep) -> str:
    return str(sweep.folder) if sweep.name else ""


def over_seeds(numbers: Sequence[Seeded]) -> list[float]:
    """Returns the mean of each seed's runs: runs that repeat a seed are not independent. Those of unknown seeds are."""
    found: dict[object, list[float]] = {}
    for place, (seed, number) in enumerate(numbers):
        found.setdefault(("unknown", place) if seed is None else seed, []).append(number)
    return [statistics.fmean(each) for each in found.values()]


def estimate(numbers: Sequence[float]) -> Estimate:
    """Returns mean and interval of at least one number."""
    mean, count = statistics.fmean(numbers), len(numbers)
    if count < 2:
        return Estimate(mean, None, None, count)
    half = student_quantile(count - 1) * statistics.stdev(numbers) / math.sqrt(count)
    return Estimate(mean, mean - half, mean + half, count)


def difference(ours: Sequence[Seeded], theirs: Sequence[Seeded]) -> Estimate | None:
    """Returns the mean of `ours` minus `theirs`, over the seeds that both have, or over all seeds if they have none in
    common; None if one of them is empty."""
    if not ours or not theirs:
        return None
    if seeds := _common(ours, theirs):
        ours, theirs = ([each for each in numbers if each[0] in seeds] for numbers in (ours, theirs))
        means = [over_seeds(sorted(numbers)) for numbers in (ours, theirs)]
        return estimate([own - other for own, other in zip(*means, strict=True)])
    ours, theirs = over_seeds(ours), over_seeds(theirs)
    mean, count = statistics.fmean(ours) - statistics.fmean(theirs), min(len(ours), len(theirs))
    if count < 2:
        return Estimate(mean, None, None, count)
    parts = [statistics.variance(numbers) / len(numbers) for numbers in (ours, theirs)]
    if not sum(parts):
        return Estimate(mean, mean, mean, count)
    freedom = sum(parts) ** 2 / sum(p**2 / (len(n) - 1) for p, n in zip(parts, (ours, theirs), strict=True))
    half = student_quantile(max(1, math.floor(freedom))) * math.sqrt(sum(parts))
    return Estimate(mean, mean - half, mean + half, count)


def paired_difference(ours: Sequence[Job], theirs: Sequence[Job]) -> Paired | None:
    """Returns the mean over documents of `ours` minus `theirs`, each averaged over the seeds that both have, or over
    all of its own if they have none in common.

    None where a job has no losses by document, as those of early versions, or scored other documents or tokens.
    """
    if seeds := _common([(job.seed, 0.0) for job in ours], [(job.seed, 0.0) for job in theirs]):
        ours, theirs = ([job for job in each if job.seed in seeds] for each in (ours, theirs))
    jobs = [*ours, *theirs]
    found = [job.sizes_of_documents() for job in jobs]
    if not ours or not theirs or None in found or found != found[:1] * len(jobs):
        return None
    sizes = np.array(found[0])
    if not sizes.any() or not same_text(jobs):
        return None
    less = _nats_of(ours) - _nats_of(theirs)
    mean = (bits_per_byte if jobs[0].quality == BITS else per_token)(less, sizes)
    return Paired(*mean, len(less), int((less < 0).sum()))


def _nats_of(jobs: Sequence[Job]) -> np.ndarray:
    """Returns the nats of each document, `[documents]`: the mean over the seeds of the jobs."""
    seeds = [job.seed for job in jobs]
    by_document = zip(*(job.evaluation["by_document"]["nats"] for job in jobs), strict=True)
    return np.array([statistics.fmean(over_seeds([*zip(seeds, nats, strict=True)])) for nats in by_document])


def _common(ours: Sequence[Seeded], theirs: Sequence[Seeded]) -> list[int]:
    """Returns the seeds of both. Runs of unknown seeds have none in common."""
    return sorted({seed for seed, _ in ours if seed is not None} & {seed for seed, _ in theirs})


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Returns the indices of the points that no other dominates (lower in one number, not higher in the other)."""
    front, best_before, best = [], math.inf, math.inf  # lowest y of all smaller x, and of all points so far
    order = sorted(range(len(points)), key=lambda index: points[index])
    for place, index in enumerate(order):
        x, y = points[index]
        if place == 0 or x > points[order[place - 1]][0]:
            best_before, lowest_here = best, y  # sorted by y within equal x
        if y == lowest_here and y < best_before:
            front.append(index)
        best = min(best, y)
    return sorted(front)


def student_quantile(freedom: float) -> float:
    """Returns t with P(|T| <= t) = CONFIDENCE for Student's T with `freedom` degrees of freedom."""
    return float(stats.t.ppf((1 + CONFIDENCE) / 2, freedom))


def _mark_fronts(rows: list[Row]) -> list[Row]:
    fronts: list[set[str]] = [set() for _ in rows]
    quality = quality_of(rows)
    if same_text([job for row in rows if quality in row.values for job in row.counted]):
        for cost in COSTS:
            numbered = [index for index, row in enumerate(rows) if cost in row.values and quality in row.values]
            points = [(rows[index].values[cost].mean, rows[index].values[quality].mean) for index in numbered]
            for place in pareto_front(points):
                fronts[numbered[place]].add(cost)
    return [replace(row, fronts=frozenset(found)) for row, found in zip(rows, fronts, strict=True)]


def _compare_with_baselines(rows: list[Row]) -> list[Row]:
    result = []
    for row in rows:
        against = None if row.baseline else _baseline_of(row, rows)
        if against is None:
            result.append(row)
            continue
        ratios = {
            key: row.values[key].mean / against.values[key].mean
            for key in COSTS
            if key in row.values and key in against.values and against.values[key].mean
        }
        same = same_text([*row.counted, *against.counted])
        less = difference(row.seeded(row.quality), against.seeded(row.quality)) if same else None
        paired = paired_difference(row.counted, against.counted)
        result.append(replace(row, against=against, difference=less, difference_paired=paired, ratios=ratios))
    return result


def _compare_with_controls(rows: list[Row]) -> list[Row]:
    result = []
    for row in rows:
        control = None if row.is_control else _control_of(row, rows)
        if control is not None:
            same = same_text([*row.counted, *control.counted])
            over_seeds = difference(row.seeded(row.quality), control.seeded(row.quality)) if same else None
            over_documents = paired_difference(row.counted, control.counted)
            row = replace(row, control=control, over_control=over_seeds, over_control_paired=over_documents)
        result.append(row)
    return result


def _control_of(row: Row, rows: Sequence[Row]) -> Row | None:
    """Returns the control of the same sweep and settings."""
    controls = [other for other in rows if other.is_control and _same_sweep(other, row)]
    same = [other for other in controls if other.jobs[0].shared == row.jobs[0].shared]
    return same[0] if same else controls[0] if len(controls) == 1 else None


def _baseline_of(row: Row, rows: Sequence[Row]) -> Row | None:
    """Returns the dense row of the same sweep and settings, or else the only one of the same sequence length."""
    dense = [other for other in rows if other.baseline and _same_sweep(other, row)]
    if row.is_control:  # the same settings at another length
        same = [other for other in dense if other.jobs[0].shared == row.jobs[0].shared]
        return same[0] if same else None
    same = [other for other in dense if other.jobs[0].context == row.jobs[0].context]
    alike = [other for other in dense if other.sequence_length == row.sequence_length]
    return same[0] if same else alike[0] if len(alike) == 1 else None


def _same_sweep(one: Row, other: Row) -> bool:
    return one.sweep == other.sweep and (not one.sweep or one.jobs[0].folder.parent == other.jobs[0].folder.parent)

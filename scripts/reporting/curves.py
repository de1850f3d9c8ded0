"""Logged metrics along a run and losses along a document, as means over a row's seeds."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from scripts.reporting.aggregate import Row, difference
from scripts.reporting.jobs import Job, finite, same_text

SMOOTHED_FRACTION = 1 / 6
"""Each smoothed value is the mean over this fraction of a run's logged steps: batches differ more than patterns."""

ROUTING = "train/routing_"
"""Prefix of the metrics of routers."""


@dataclass(frozen=True)
class Curve:
    """The mean of a logged metric over a row's seeds, at the steps that all seeds logged."""

    tokens: tuple[float, ...]
    seconds: tuple[float, ...]  # of training, without evaluation, checkpoints and compilation
    values: tuple[float, ...]
    finished: bool  # False for unfinished jobs

    def along(self, name: str) -> tuple[float, ...]:
        return {"tokens": self.tokens, "seconds": self.seconds}[name]


def curve_of(row: Row, name: str, smooth: bool = False) -> Curve | None:
    """Returns the curve of `name`, a column of metrics.csv; None if no job logged it at two steps.

    Uses the row's finished jobs, or all jobs if none is finished.
    """
    jobs = row.counted or row.jobs
    seeds = [found for job in jobs if len(found := _points(job, name, smooth)) > 1]
    if not seeds:
        return None
    steps = sorted(set.intersection(*(set(found) for found in seeds)))
    if len(steps) < 2:
        steps, seeds = sorted(seeds[0]), seeds[:1]
    columns = [tuple(statistics.fmean(found[step][column] for found in seeds) for step in steps) for column in range(3)]
    return Curve(*columns, finished=bool(row.counted))


def _points(job: Job, name: str, smooth: bool) -> dict[int, tuple[float, float, float]]:
    """Returns {step: (tokens, seconds, value)} of one job."""
    per_step = tokens_per_step(job)
    if per_step is None:
        return {}
    times = [row["step_seconds"] for row in job.metrics if row.get("step_seconds", 0) > 0]
    pace = times[0] if times else 0.0  # assumed for the first steps, which are not measured
    points: dict[int, tuple[float, float, float]] = {}
    seconds, before, recent = 0.0, 0.0, []
    keep = max(1, int(sum(name in row for row in job.metrics) * SMOOTHED_FRACTION)) if smooth else 1
    for row in job.metrics:
        pace = row.get("step_seconds", pace)
        seconds += max(0.0, row["step"] - before) * pace
        before = max(before, row["step"])
        if name in row:
            recent = [*recent, row[name]][-keep:]
            points[int(row["step"])] = row["step"] * per_step, seconds, statistics.fmean(recent)
    return points


def tokens_per_step(job: Job) -> float | None:
    """Returns a job's tokens per step from its summary, or from its config; None if both lack them."""
    tokens, steps = finite(job.summary.get("train_tokens")), finite(job.summary.get("step"))
    if tokens and steps:
        return tokens / steps
    parts = [
        job.setting("data", "sequence_length"), job.setting("data", "batch_size"), job.setting("trainer", "accumulate"),
        job.summary.get("devices", 1),
    ]  # fmt: skip
    numbers = [finite(part) for part in parts]
    return None if None in numbers else float(numbers[0] * numbers[1] * numbers[2] * numbers[3])


def positions_of(row: Row) -> list[dict[str, float | None]]:
    """Returns the loss by position: the mean over seeds of each bucket's loss and bounds, which are over documents.

    The bounds are None in buckets that one document reaches. Includes only the buckets of all seeds.
    """
    evaluations = [_buckets(job.evaluation) for job in row.counted]
    if not evaluations:
        return []
    edges = sorted(set.intersection(*(set(found) for found in evaluations)))
    return [
        {"start": start, "stop": stop}
        | {key: _mean([found[start, stop].get(key) for found in evaluations]) for key in ("loss", "low", "high")}
        for start, stop in edges
    ]


def position_differences_of(row: Row) -> list[dict[str, float | None]]:
    """Returns the loss by position minus that of the row's baseline, with bounds over seeds.

    With one seed the bounds are None. Includes only the buckets of all seeds of both rows.
    """
    if row.against is None or not same_text([*row.counted, *row.against.counted]):
        return []
    ours, theirs = ({job.seed: _buckets(job.evaluation) for job in each.counted} for each in (row, row.against))
    everything = [*ours.values(), *theirs.values()]
    if not ours or not theirs:
        return []
    found = []
    for edge in sorted(set.intersection(*(set(buckets) for buckets in everything))):
        losses = [[(seed, buckets[edge]["loss"]) for seed, buckets in each.items()] for each in (ours, theirs)]
        less = difference(*losses)
        found.append({"start": edge[0], "stop": edge[1], "loss": less.mean, "low": less.low, "high": less.high})
    return found


def _buckets(evaluation: Mapping[str, object] | None) -> dict[tuple[float, float], Mapping[str, float]]:
    found = (evaluation or {}).get("by_position")
    keys = ("start", "stop", "loss")
    whole = [b for b in found if all(finite(b.get(key)) is not None for key in keys)] if isinstance(found, list) else []
    return {(bucket["start"], bucket["stop"]): bucket for bucket in whole}


def _mean(values: Sequence[float | None]) -> float | None:
    return None if None in values else statistics.fmean(values)


def routing_of(row: Row) -> dict[str, float]:
    """Returns {name: mean over seeds of the last logged value} of the routers' metrics."""
    jobs = row.counted or row.jobs
    names = dict.fromkeys(key for job in jobs for logged in job.metrics for key in logged if key.startswith(ROUTING))
    last = {name: [_last(job.metrics, name) for job in jobs] for name in names}
    return {
        name.removeprefix(ROUTING): statistics.fmean(v for v in values if v is not None)
        for name, values in last.items()
    }


def _last(metrics: Sequence[Mapping[str, float]], name: str) -> float | None:
    return next((row[name] for row in reversed(metrics) if name in row), None)

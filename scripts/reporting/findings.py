"""The findings of a report as sentences, with the uncertainty of every number."""

from collections import Counter
from collections.abc import Sequence

from scripts.reporting.aggregate import COSTS, Estimate, Paired, Row, quality_of
from scripts.reporting.contexts import useless_contexts
from scripts.reporting.jobs import STATES, Sweep, same_text
from scripts.reporting.manifest import FIRST_STAGE
from scripts.reporting.table import signed, significant, unit_of

MOST_SENTENCES = 8
"""Largest number of patterns with a sentence each; of more, only those on the front of the first cost have one."""

UNTIMED = (
    "Jobs shared a device, with each other or with other processes, so their step times, throughput and decoding times "
    "do not compare and are left out (each run's summary.json has them)."
)

UNEQUAL_TIME = (
    "Seconds of training were counted while jobs shared a device, so the same training time was not the same budget: "
    "do not compare their quality."
)

MATCHED = {"tokens": "the same tokens", "time": "the same training time", "flops": "the same training FLOPs"}
COST_NAMES = {
    "step_seconds": "step time",
    "attention_flops_per_token": "attention FLOPs",
    "peak_memory_bytes": "peak memory",
}


def without_times(sweeps: Sequence[Sweep]) -> list[str]:
    """Returns what does not compare because jobs ran at the same time on one device, if any did."""
    shared = [sweep for sweep in sweeps if not sweep.timed]
    return [UNTIMED] * bool(shared) + [UNEQUAL_TIME] * any(sweep.match == "time" for sweep in shared)


def title_of(sweeps: Sequence[Sweep]) -> str:
    return ", ".join(sweep.name or "Runs" for sweep in sweeps)


def progress(sweeps: Sequence[Sweep]) -> str:
    """Returns the number of jobs in each state: "7 of 9 jobs done, 1 running, 1 failed"."""
    states = Counter(job.state for sweep in sweeps for job in sweep.jobs)
    total = sum(states.values())
    rest = [f"{states[state]} {state}" for state in STATES[1:] if states[state]]
    jobs = "job" if total == 1 else "jobs"
    return ", ".join([f"{states['done']} of {total} {jobs} done", *rest])


def budgets(sweeps: Sequence[Sweep]) -> list[str]:
    """Returns, for each sweep, the budget that all its jobs had."""
    return [
        (f"{sweep.name}: " if len(sweeps) > 1 and sweep.name else "")
        + (
            f"every pattern and size had each of {len(flops)} budgets, {flops[0]:.3g} to {flops[-1]:.3g} training FLOPs"
            if len(flops := sorted({job.flops for job in sweep.jobs if job.flops is not None})) > 1
            else f"every job had {MATCHED.get(str(sweep.match), str(sweep.match))}{_budget(sweep)}"
            if sweep.match
            else "the jobs have no common budget"
        )
        + _first_stages(sweep)
        for sweep in sweeps
    ]


def _first_stages(sweep: Sweep) -> str:
    """Returns the training that the jobs' weights had before."""
    found = dict.fromkeys(
        f"{in_unit(tokens, 'tokens')} tokens of full attention in sequences of {length:,}"
        + ", from the weights of another run, whose cost is not counted," * bool(job.config.get("init_from"))
        for job in sweep.jobs
        if job.role == FIRST_STAGE and (length := job.setting("data", "sequence_length"))
        if (tokens := job.number("train_tokens"))
    )
    return f", after a first stage of {' / '.join(found)} that they share" if found else ""


def comparisons(rows: Sequence[Row]) -> list[str]:
    """Returns the findings, most important first."""
    quality = quality_of(rows)
    evaluated = [row for row in rows if quality in row.values]
    if not evaluated:
        return ["No job has been evaluated yet, so there is nothing to compare."]
    found = useless_contexts(evaluated)
    found += [_against_control(row) for row in evaluated if row.over_control is not None]
    compared = [row for row in evaluated if row.difference is not None]
    same = same_text([job for row in evaluated for job in row.counted])
    if len(compared) > MOST_SENTENCES:
        cost = next(cost for cost in COSTS if any(cost in row.values for row in compared))
        shown = [row for row in compared if cost in row.fronts] or compared[:MOST_SENTENCES]
        found.append(
            f"{len(compared)} patterns were compared with dense. Those on the Pareto front of {COST_NAMES[cost]}:"
        )
    else:
        shown = compared
    found += [_against_dense(row) for row in shown]
    if not compared:
        baselines = [row for row in rows if row.baseline]
        if not baselines:
            found.append(
                "There is no dense baseline among these jobs, so the patterns are compared only with one another."
            )
        elif not any(row in evaluated for row in baselines):
            found.append("Dense has not finished, so the patterns cannot be compared with it yet.")
        elif same and len(evaluated) > len([row for row in evaluated if row.baseline]):
            found.append("No dense baseline has the same settings as these patterns.")
    if len(evaluated) > 1 and same:
        best = min(evaluated, key=lambda row: row.values[quality].mean)
        found.append(f"Best in quality: {best.label}, {best.values[quality].mean:.4f} {best.unit}.")
        fronts: dict[tuple[str, ...], list[str]] = {}
        for cost in COSTS:
            front = sorted((row for row in evaluated if cost in row.fronts), key=lambda row: row.values[cost].mean)
            if front:
                fronts.setdefault(tuple(row.label for row in front), []).append(COST_NAMES[cost])
        for labels, costs in fronts.items():
            found.append(f"On the Pareto front of {listed(costs)}, from cheapest to best: {', '.join(labels)}.")
    return found


def _against_dense(row: Row) -> str:
    costs = []
    for cost in ("step_seconds", "attention_flops_per_token"):
        if cost in row.ratios:
            whose = "its" if costs else f"{row.against.label}'s"
            costs.append(f"{row.ratios[cost]:.2f} of {whose} {COST_NAMES[cost]}")
    bounds = _bounds(row.difference_paired, row.difference)
    mean = row.difference.mean
    better = "worse" if mean > 0 else "better"
    size = f"{abs(mean):.4f}"
    change = f"is {better} by {size} {row.unit}" if float(size) else f"has the same {row.unit} to four places"
    if any(each.low <= 0 <= each.high for each in bounds):
        change += ", which may be chance"
    took = f"takes {' and '.join(costs)} and " if costs else ""
    return f"{row.label} {took}{change} ({_certainty(bounds, row.difference)})."


def _against_control(row: Row) -> str:
    """Returns whether a pattern beats the baseline at short context, with the intervals over documents and seeds."""
    mean, bounds = row.over_control.mean, _bounds(row.over_control_paired, row.over_control)
    size = f"{abs(mean):.4f} {row.unit}"
    if bounds and all(each.high < 0 for each in bounds):
        verdict = f"beats {row.control.label} by {size}"
    elif mean > 0 and all(each.low > 0 for each in bounds):
        verdict = f"does not beat {row.control.label}: it is worse by {size}"
    elif mean:
        better = "better" if mean < 0 else "worse"
        verdict = f"is not shown to beat {row.control.label}: it is {better} by {size}, which may be chance"
    else:
        verdict = f"equals {row.control.label}"
    return f"{row.label} {verdict} ({_certainty(bounds, row.over_control)})."


def _bounds(*found: Estimate | Paired | None) -> list[Estimate | Paired]:
    """Returns those that have an interval."""
    return [each for each in found if each is not None and each.low is not None]


def _certainty(bounds: Sequence[Estimate | Paired], over_seeds: Estimate) -> str:
    """Returns the intervals of a difference in words."""
    intervals = " and ".join(map(_interval, bounds))
    certainty = f"95 % interval of the difference {intervals}" if bounds else "no interval"
    return certainty + (", one seed" if over_seeds.low is None else "")


def _interval(found: Estimate | Paired) -> str:
    if isinstance(found, Paired):
        over = f"over {found.documents} documents, better on {found.better}"
    else:
        over = f"over {found.count} seeds"
    return f"{signed(found.low)} to {signed(found.high)} {over}"


def listed(names: Sequence[str]) -> str:
    """Returns "a, b and c"."""
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def _budget(sweep: Sweep) -> str:
    budget = sweep.budget or {}
    for key, kind, unit in (("tokens", "tokens", " tokens"), ("seconds", None, " s"), ("flops", "flops", "")):
        if isinstance(budget.get(key), int | float):
            return f" ({in_unit(budget[key], kind)}{unit})"
    return ""


def in_unit(value: float, kind: str | None) -> str:
    if kind is None:
        return significant(value)
    size, unit = unit_of(kind, value)
    return significant(value / size) + (f" {unit.removesuffix('s')}" if unit else "")

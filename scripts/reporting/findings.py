"""The findings of a report as sentences, with the uncertainty of every number."""

from collections import Counter
from collections.abc import Sequence
from itertools import combinations

from data.units import LOSS, OF_TEXT
from scripts.console import counted
from scripts.reporting.aggregate import COSTS, Estimate, Paired, Row, quality_of, unit_of_quality
from scripts.reporting.contexts import useless_contexts
from scripts.reporting.jobs import STATES, Job, Sweep, finite, same_text
from scripts.reporting.manifest import FIRST_STAGE, PATTERN
from scripts.reporting.table import signed, significant, unit_of

MOST_SENTENCES = 8
"""Largest number of patterns with a sentence each; of more, only those on the front of the first cost have one."""

LONG = 4096
"""Tokens of a sequence from which on a report without a control has a caution."""

UNTIMED = (
    "Jobs shared a device, with each other or with other processes, so their step times, throughput and decoding times "
    "do not compare and are left out (each run's summary.json has them)."
)

UNEQUAL_TIME = (
    "Seconds of training were counted while jobs shared a device, so the same training time was not the same budget: "
    "do not compare their quality."
)

MOST_UNTIMED = 0.02
"""Share of a job's tokens that may be trained while the clock stands, without a caution."""

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
        f"{_in_unit(tokens, 'tokens')} tokens of full attention in sequences of {length:,}"
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
            found.append(f"On the Pareto front of {_and(costs)}, from cheapest to best: {', '.join(labels)}.")
    return found


def cautions(sweeps: Sequence[Sweep], rows: Sequence[Row]) -> list[str]:
    """Returns the limits of these comparisons."""
    quality = quality_of(rows)
    evaluated = [row for row in rows if quality in row.values]
    jobs = [job for row in evaluated for job in row.counted]
    found = []
    single = [row for row in evaluated if row.values[quality].count == 1]
    if single and len(evaluated) > 1:
        which = "Every pattern" if len(single) == len(evaluated) else ", ".join(row.label for row in single)
        found.append(
            f"{which} ran with one seed: no interval contains the noise of training, and small differences may be "
            "chance."
        )
    found += _fewer_seeds(evaluated)
    bounds = [row.values[quality] for row in evaluated if row.values[quality].low is not None]
    if any(one.low <= other.high and other.low <= one.high for one, other in combinations(bounds, 2)):
        found.append(
            "The best in quality and the Pareto fronts are those of means: where intervals overlap, they may be chance."
        )
    if len(evaluated) > 1 and any(sweep.match is None for sweep in sweeps):
        found += [
            f"Unequal budgets: {name} from {low} to {high}."
            for key, name, kind in (
                ("train_tokens", "tokens trained on", "tokens"),
                ("train_seconds", "training time", None),
            )
            for low, high in [_range(evaluated, key, kind)]
            if low != high
        ]
    per_token = [row for row in rows if LOSS in row.values]
    if without_text := [row.label for row in per_token if row.unit == OF_TEXT[LOSS]]:
        found.append(
            f"The tokens of {_and(without_text)} have no text: their losses, in nats per token, compare only runs on"
            " the same token files."
        )
    other_tokens = len({str(job.evaluation.get("tokenizer")) for row in per_token for job in row.counted}) > 1
    if other_tokens:
        found.append(f"The jobs have different tokenizers: do not compare their {unit_of_quality(per_token)}.")
    found += [
        f"{counted(len(sweep.replaced), 'job')} of earlier settings left out: later jobs have the same overrides."
        for sweep in sweeps
        if sweep.replaced
    ]
    found += _untimed_steps(sweeps) + _without_control(evaluated) + _like_dense(evaluated) + _untrained(jobs)
    found += [f"{job.label}, seed {job.seed}: {'; '.join(job.problems)}." for job in jobs if job.problems]
    if not same_text(jobs) and not other_tokens:
        found.append(
            f"The jobs were evaluated on different held-out text (see evaluation.limit): {unit_of_quality(rows)} of"
            " different text are not compared."
        )
    protocols = {
        str(sorted((job.evaluation.get("protocol") or {}).items(), key=str)) for job in jobs if job.role == PATTERN
    }
    if len(protocols) > 1:
        found.append("The jobs were evaluated with different protocols (window, stride): see each evaluation.json.")
    devices = {str(job.summary.get("device")) for job in jobs}
    if len(devices) > 1:
        found.append(
            f"The jobs ran on different devices ({', '.join(sorted(devices))}): do not compare times and memory."
        )
    if any(job.summary.get("device") == "cpu" or job.setting("trainer", "accelerator") == "cpu" for job in jobs):
        found.append(
            "On a CPU, peak memory includes the whole process and memory of earlier jobs: compare it with care."
        )
    return found


def _fewer_seeds(evaluated: Sequence[Row]) -> list[str]:
    """Returns a warning if patterns of one sweep ran with different seeds, whose means do not compare."""
    seeds: dict[str, set[int | None]] = {}
    for row in evaluated:
        seeds.setdefault(row.sweep, set()).update(job.seed for job in row.counted)
    fewer = [row.label for row in evaluated if {job.seed for job in row.counted} != seeds[row.sweep]]
    if not fewer:
        return []
    return [
        f"{_and(fewer)} {'lacks' if len(fewer) == 1 else 'lack'} seeds that others have: differences to dense and to "
        "the control are of the seeds that both have, while the fronts and the best in quality compare means of "
        "different seeds."
    ]


def _untimed_steps(sweeps: Sequence[Sweep]) -> list[str]:
    """Returns a caution if jobs of equal time trained much of their tokens while the clock stood: in the first steps of
    a session, which compile."""
    shares: dict[str, float] = {}
    for job in (job for sweep in sweeps if sweep.match == "time" and sweep.timed for job in sweep.jobs if job.counted):
        seconds, rate, tokens = map(job.number, ("measured_seconds", "tokens_per_second", "train_tokens"))
        if job.role != FIRST_STAGE and seconds and rate and tokens:
            shares[job.label] = max(shares.get(job.label, 0.0), 1 - seconds * rate / tokens)
    if max(shares.values(), default=0.0) <= MOST_UNTIMED:
        return []
    told = _and([f"{max(0.0, share):.0%} of the tokens of {label}" for label, share in shares.items()])
    return [f"The clock stands during the first steps of a session, which compile: {told} were trained outside of it."]


def _without_control(evaluated: Sequence[Row]) -> list[str]:
    """Returns a warning if no model was trained at short context, to which long context could be compared."""
    long = [row.sequence_length for row in evaluated if (row.sequence_length or 0) >= LONG]
    if len(evaluated) < 2 or not long or any(row.is_control or row.control for row in evaluated):
        return []
    return [
        f"No control at short context is among these jobs: full attention in shorter sequences than {max(long):,} "
        "tokens may be better at the same cost (sweep.control)."
    ]


def _like_dense(evaluated: Sequence[Row]) -> list[str]:
    """Returns a caution for patterns that compute all pairs at this length."""
    density = {row.label: row.values["density_pairs"].mean for row in evaluated if "density_pairs" in row.values}
    sparse = [row for row in evaluated if not row.baseline and not row.is_control]
    same = [row.label for row in sparse if density.get(row.label, 0.0) > 0.9999]
    computes = "computes" if len(same) == 1 else "compute"
    return [f"{_and(same)} {computes} all pairs at this length, as dense does: there is no sparsity."] if same else []


def _untrained(jobs: Sequence[Job]) -> list[str]:
    """Returns cautions for runs that are not better than a bigram model."""
    bigrams = [finite((job.evaluation.get("baselines") or {}).get(f"bigram_{job.quality}")) for job in jobs]
    if not bigrams or None in bigrams:
        return []
    worse = [job for job, bigram in zip(jobs, bigrams, strict=True) if job.evaluation[job.quality] >= bigram]
    model = f"a bigram model of the same tokens ({bigrams[0]:.4f} {jobs[0].units[jobs[0].quality]})"
    if len(worse) == len(jobs):
        return [f"No pattern is better than {model}: these runs are too short to compare patterns."]
    return [f"{job.label}, seed {job.seed}, is not better than {model}: it is too short, or diverged." for job in worse]


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


def _and(names: Sequence[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def _budget(sweep: Sweep) -> str:
    budget = sweep.budget or {}
    for key, kind, unit in (("tokens", "tokens", " tokens"), ("seconds", None, " s"), ("flops", "flops", "")):
        if isinstance(budget.get(key), int | float):
            return f" ({_in_unit(budget[key], kind)}{unit})"
    return ""


def _range(rows: Sequence[Row], key: str, kind: str | None) -> tuple[str, str]:
    numbers = [row.values[key].mean for row in rows if key in row.values] or [0.0]
    unit = " s" if kind is None else ""
    return _in_unit(min(numbers), kind) + unit, _in_unit(max(numbers), kind) + unit


def _in_unit(value: float, kind: str | None) -> str:
    if kind is None:
        return significant(value)
    size, unit = unit_of(kind, value)
    return significant(value / size) + (f" {unit.removesuffix('s')}" if unit else "")

"""The cautions of a report: what its comparisons do not show."""

from collections.abc import Sequence
from itertools import combinations

from data.units import LOSS, OF_TEXT
from scripts.console import counted
from scripts.reporting.aggregate import Row, quality_of, unit_of_quality
from scripts.reporting.findings import in_unit, listed
from scripts.reporting.jobs import Job, Sweep, finite, same_text
from scripts.reporting.manifest import FIRST_STAGE, PATTERN

LONG = 4096
"""Tokens of a sequence from which on a report without a control has a caution."""

MOST_UNTIMED = 0.02
"""Share of a job's tokens that may be trained while the clock stands, without a caution."""

MOST_PASSES = 4
"""Passes over the training text without a caution (Muennighoff et al. 2023)."""


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
            f"The tokens of {listed(without_text)} have no text: their losses, in nats per token, compare only runs on"
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
    found += (
        _untimed_steps(sweeps)
        + _repeated_text(evaluated)
        + _without_control(evaluated)
        + _like_dense(evaluated)
        + _untrained(jobs)
    )
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
        f"{listed(fewer)} {'lacks' if len(fewer) == 1 else 'lack'} seeds that others have: differences to dense and to "
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
    told = listed([f"{max(0.0, share):.0%} of the tokens of {label}" for label, share in shares.items()])
    return [f"The clock stands during the first steps of a session, which compile: {told} were trained outside of it."]


def _repeated_text(evaluated: Sequence[Row]) -> list[str]:
    """Returns a caution for rows that read their training text more often than it teaches as new text does."""
    passes = {row.label: max(filter(None, map(_passes, row.counted)), default=0.0) for row in evaluated}
    often = [f"{label} {times:.1f} times" for label, times in passes.items() if times > MOST_PASSES]
    if not often:
        return []
    return [
        f"Training read its text {listed(often)}: beyond about {MOST_PASSES} times, text teaches less than new text "
        "(arXiv:2305.16264), so patterns that read it more often are at a disadvantage."
    ]


def _passes(job: Job) -> float | None:
    """Returns how often both stages of a job read their training text; None where it has no number of tokens."""
    tokens, each = job.number("total_tokens") or job.number("train_tokens"), job.number("tokens_per_pass")
    return tokens / each if tokens and each else None


def _without_control(evaluated: Sequence[Row]) -> list[str]:
    """Returns a caution if all models were trained at long context: nothing shows what short context reaches."""
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
    return [f"{listed(same)} {computes} all pairs at this length, as dense does: there is no sparsity."] if same else []


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


def _range(rows: Sequence[Row], key: str, kind: str | None) -> tuple[str, str]:
    numbers = [row.values[key].mean for row in rows if key in row.values] or [0.0]
    unit = " s" if kind is None else ""
    return in_unit(min(numbers), kind) + unit, in_unit(max(numbers), kind) + unit

"""What a row's patterns do with long context: the loss of the same tokens by the amount of context, and recall.

Both are means over the row's seeds.
"""

import statistics
from collections.abc import Mapping, Sequence
from itertools import pairwise

from model.evaluation.statistics import share_bounds
from scripts.console import counted
from scripts.reporting.aggregate import Estimate, Row, estimate
from scripts.reporting.jobs import Job, finite

KEYS = ("loss", "low", "high", "change", "change_low", "change_high", "gain", "gain_low", "gain_high")


def by_context_of(row: Row) -> list[dict[str, float]]:
    """Returns {"context", "tokens", "documents", *KEYS} of every context in tokens that all seeds have, ascending.

    Bounds are over documents, and averaged over seeds. `change` is the loss minus that of the context before, `gain`
    that of the first context minus the loss; a first context, and an evaluation of an early version, have none.
    """
    found = [_contexts(job) for job in row.counted]
    if not found:
        return []
    result = []
    for context in sorted(set.intersection(*(set(each) for each in found))):
        numbers = [each[context] for each in found]
        entry = {key: numbers[0][key] for key in ("context", "tokens", "documents") if key in numbers[0]}
        for key in KEYS:
            values = [finite(each.get(key)) for each in numbers]
            if None not in values:
                entry[key] = statistics.fmean(values)
        result.append(entry)
    return result


def _contexts(job: Job) -> dict[int, Mapping[str, float]]:
    """Returns {context: its entry of evaluation.json}; {} where a context's change is not to the next shorter one."""
    entries = [entry for entry in (job.evaluation or {}).get("by_context") or () if finite(entry["context"])]
    ascending = all(one["context"] < other["context"] for one, other in pairwise(entries))
    return {entry["context"]: entry for entry in entries} if ascending else {}


def recall_of(row: Row, length: int) -> dict[str, Estimate]:
    """Returns {task: share of exact answers in sequences of `length` tokens}, of the tasks that all seeds have. The
    bounds of a row with one seed are over its answers, as if these were independent."""
    found = [{task: counts[length] for task, counts in job.recall.items() if length in counts} for job in row.counted]
    tasks = [task for task in (found[0] if found else {}) if all(task in each for each in found)]
    return {task: _share([each[task] for each in found]) for task in tasks}


def _share(counts: Sequence[tuple[int, int]]) -> Estimate:
    over_seeds = estimate([exact / asked for exact, asked in counts])
    if len(counts) > 1:
        return over_seeds
    return Estimate(over_seeds.mean, *share_bounds(*counts[0]), count=1)


def recall_length(rows: Sequence[Row]) -> int | None:
    """Returns the longest length of training, or below it, at which recall was measured; None if it was not."""
    longest = max((row.sequence_length or 0 for row in rows), default=0)
    measured = {length for row in rows for job in row.counted for shares in job.recall.values() for length in shares}
    return max((length for length in measured if length <= longest), default=None)


def longest_useful(contexts: Sequence[Mapping[str, float]]) -> int | None:
    """Returns the longest context with a lower loss than the next shorter one, beyond the interval of this change; the
    shortest context if there is none. Returns None where no change was measured."""
    if not any("change_high" in entry for entry in contexts):
        return None
    useful = [entry["context"] for entry in contexts if entry.get("change_high", 0.0) < 0]
    return int(max(useful, default=contexts[0]["context"]))


def useless_contexts(rows: Sequence[Row]) -> list[str]:
    """Returns a sentence for all rows whose longest useful context is shorter than the longest that was measured within
    the length of their training, and one for the rows whose loss a longer context within it raises."""
    harmed = []
    labels: dict[tuple[int, int, int, str], list[str]] = {}
    for row in rows:
        contexts = [entry for entry in by_context_of(row) if entry["context"] <= (row.sequence_length or 0)]
        useful = longest_useful(contexts)
        if useful is not None and useful < contexts[-1]["context"]:
            key = useful, int(contexts[-1]["context"]), row.sequence_length, _scored(contexts[-1])
            labels.setdefault(key, []).append(row.label)
        harmed += [f"{row.label} with {e['context']:,.0f}" for e in contexts if e.get("change_low", 0.0) > 0]
    rises = f"More context raises the loss of the same tokens, beyond its interval: {', '.join(harmed)} tokens."
    return [
        f"Trained on sequences of {length:,} tokens, {', '.join(names)}: no context of more than {useful:,} tokens is "
        f"shown to lower the loss of the same {scored} (measured up to {longest:,})."
        for (useful, longest, length, scored), names in labels.items()
    ] + [rises] * bool(harmed)


def _scored(context: Mapping[str, float]) -> str:
    """Returns what the losses by context are of: the fewer documents, the wider are the intervals of their changes."""
    tokens = f"{context['tokens']:,.0f} tokens" if "tokens" in context else "tokens"
    return f"{tokens} of {counted(context['documents'], 'document')}"

"""Training FLOPs of a run whose steps cost more in each of its phases."""

from collections.abc import Sequence
from itertools import pairwise

PhaseCosts = Sequence[tuple[int, float]]
"""(first optimizer step, cost of one step) of each phase, in order; the first one begins at step 0."""


def total_cost(phases: PhaseCosts, steps: int) -> float:
    """Returns the cost of the first `steps` steps of a run."""
    ends = [*(first for first, _ in phases[1:]), steps]
    return sum(cost * max(0, min(steps, end) - first) for (first, cost), end in zip(phases, ends, strict=True))


def steps_of_cost(phases: PhaseCosts, total: float) -> float:
    """Returns the number of steps that cost `total`, the inverse of `total_cost`."""
    for (first, cost), (end, _) in pairwise(phases):
        if total <= cost * (end - first):
            return first + total / cost
        total -= cost * (end - first)
    first, cost = phases[-1]
    return first + total / cost

"""The time of work on a GPU."""

import statistics
from collections.abc import Callable

import torch


def median_ms(step: Callable, rounds: int) -> float:
    """Returns the median time of `rounds` calls of `step` in milliseconds, after one call that is not counted."""
    times = []
    for _ in range(rounds + 1):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        step()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times[1:])

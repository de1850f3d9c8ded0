"""Whether jobs of a sweep ran at the same time on one device, so that their times do not compare."""

from collections.abc import Iterable
from datetime import datetime
from itertools import combinations

from scripts.reporting.jobs import Job

TIMES = ("step_seconds", "tokens_per_second", "mfu_exact", "train_seconds", "total_seconds", "decode_ms_per_token")
"""Measured numbers of a job that another job on its device changes."""

ROUNDING = 2.0
"""Seconds by which jobs may seem to overlap that ran one after the other: a manifest has whole seconds."""


def shared_a_device(jobs: Iterable[Job]) -> bool:
    """Returns whether two of the jobs ran at the same time where both saw the same devices.

    Sweeps of earlier versions did not record the devices: there any two jobs at the same time count.
    """
    spans = [
        (end - job.seconds, end, job.ran_on)
        for job in jobs
        if job.ended and job.seconds
        for end in [datetime.fromisoformat(job.ended).timestamp()]
    ]
    return any(
        min(end, other_end) - max(start, other_start) > ROUNDING and (None in (where, other) or where == other)
        for (start, end, where), (other_start, other_end, other) in combinations(spans, 2)
    )

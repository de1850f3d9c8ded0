"""Finds out whether jobs of a sweep ran at the same time on one device: their times then do not compare."""

from collections.abc import Iterable
from datetime import datetime
from itertools import combinations

from scripts.reporting.manifest import JobEntry

ROUNDING = 2.0
"""A manifest has times in whole seconds, so jobs that ran one after the other may seem to overlap by so much."""


def shared_a_device(jobs: Iterable[JobEntry]) -> bool:
    """Returns whether any two of the jobs ran at the same time on the same visible devices.

    Manifests of earlier versions do not record the devices of a job. Such a job is assumed to share those of the other.
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

"""Finds out whether jobs shared their device, with each other or with other processes: their times then do not compare.

The jobs of one sweep are found by their times in its manifest. Other processes, as jobs of another sweep, are found by
the memory that they use on a GPU; those that use less than OF_LIBRARIES, and those on a CPU, are not found.
"""

from collections.abc import Iterable, Mapping
from datetime import datetime
from itertools import combinations
from typing import Any

from scripts.reporting.manifest import JobEntry

ROUNDING = 2.0
"""A manifest has times in whole seconds, so jobs that ran one after the other may seem to overlap by so much."""


OF_LIBRARIES = 3 << 30
"""Bytes of a GPU that are taken for those of CUDA and its libraries in the job's own process."""


def used_by_others(summaries: Iterable[Mapping[str, Any]]) -> bool:
    """Returns whether another process used the GPU of any of the runs while it trained. Summaries of earlier versions
    do not record it."""
    return any((summary.get("memory_bytes_of_others") or 0) > OF_LIBRARIES for summary in summaries)


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

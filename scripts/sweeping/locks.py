"""Locks on a sweep's manifest, its jobs and its report, for the processes that work on one sweep at the same time.

A process that changes the manifest holds its lock from reading to writing. A process that runs a job holds the job's
lock, which the operating system releases when the process ends.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from model.training.storage import make_folder, write_json
from scripts.reporting.manifest import MANIFEST_FILE, JobEntry, Manifest, lock_file, read_manifest

LOCK_TIMEOUT = 0.5
"""Seconds to wait for a job's lock. Reports and other launches take it briefly to test whether the job runs."""


def lock(folder: Path, name: str) -> FileLock:
    """Returns a lock of the sweep in `folder`: "manifest", "report", or the hash of a job."""
    file = lock_file(folder, name)
    make_folder(file.parent)
    return FileLock(file)


@contextlib.contextmanager
def changing(folder: Path, new: Manifest | None = None) -> Iterator[Manifest]:
    """Yields the manifest, locked, and writes it when the block ends. Yields `new` if the file does not exist yet."""
    with lock(folder, "manifest"):
        manifest = read_manifest(folder) if new is None or (folder / MANIFEST_FILE).exists() else new
        yield manifest
        write_json(folder / MANIFEST_FILE, manifest.to_dict())


@contextlib.contextmanager
def changing_job(folder: Path, hash: str) -> Iterator[JobEntry]:
    """Yields one job of the manifest, as `changing` yields the manifest."""
    with changing(folder) as manifest:
        job = manifest.job(hash)
        assert job is not None, hash
        yield job


def is_running(folder: Path, job: JobEntry) -> bool:
    """Whether a live process holds the job's lock."""
    held = lock(folder, job.hash)
    try:
        held.acquire(timeout=LOCK_TIMEOUT)
    except Timeout:
        return True
    held.release()
    return False

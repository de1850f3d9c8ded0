"""manifest.json of a sweep: its jobs, their states, and whether a running job was killed.

Sweeps write it under locks (scripts/sweeping/locks.py); reports only read it. The process that runs a job holds the
job's lock, and the operating system releases it when the process ends. So a job whose state is "running" and whose
lock is free was killed.
"""

import json
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from datetime import datetime
from pathlib import Path
from typing import Any

from model.training import failures
from model.training.run_folder import RunFolderError

WAITING, RUNNING, DONE, FAILED, INTERRUPTED = "waiting", "running", "done", "failed", "interrupted"
OUT_OF_MEMORY = failures.OUT_OF_MEMORY  # the same word as in a run's summary.json

PATTERN, CONTROL, FIRST_STAGE = "pattern", "control", "first stage"
"""Roles of a job: one of the patterns that a sweep compares, the baseline at short context, or the run at short context
from whose weights the others start."""

MANIFEST_FILE = "manifest.json"


@dataclass
class JobEntry:
    """The manifest's entry for one run of a sweep."""

    hash: str  # config_hash of its config
    label: str  # the settings in which it differs from other jobs, without the seed
    overrides: list[str]  # all overrides of `python train.py`
    seed: int
    baseline: bool  # whether it is the full attention that others are compared with
    folder: str  # relative to the sweep's folder
    command: str  # reproduces this run alone
    role: str = PATTERN
    first_stage: str | None = None  # the hash of the job from whose weights it starts
    flops: float | None = None  # its budget, in a sweep of several
    pattern: str | None = None  # there, the part of the label that describes the attention
    state: str = WAITING
    started: str | None = None  # ISO 8601, of the first attempt
    ended: str | None = None
    seconds: float | None = None  # sum over all attempts, evaluation included
    exit_reason: str | None = None  # one line
    traceback: str | None = None
    host: str | None = None  # the machine that runs it; None before and after
    ran_on: str | None = None  # the machine and the devices that its last attempt could see

    @property
    def name(self) -> str:
        return f"{self.label} seed={self.seed}"

    def start(self) -> None:
        self.state, self.started = RUNNING, self.started or _now()
        self.ended = self.exit_reason = self.traceback = None
        self.host = platform.node()
        self.ran_on = f"{self.host}, CUDA_VISIBLE_DEVICES={os.environ.get('CUDA_VISIBLE_DEVICES', 'all')}"

    def end(self, state: str, seconds: float, reason: str | None = None, traceback: str | None = None) -> None:
        self.state, self.ended, self.seconds = state, _now(), (self.seconds or 0.0) + seconds
        self.exit_reason, self.traceback, self.host = reason, traceback, None


@dataclass
class Manifest:
    """The content of manifest.json."""

    sweep: str
    match: str | None  # tokens, time, flops
    budget: dict[str, Any] | None  # {"tokens": ...}, {"seconds": ...} or {"flops": ...}, one or a list
    command: str
    versions: dict[str, str | None]
    first_stage: dict[str, Any] | None = None  # sweep.first_stage: its length, tokens and learning rate
    device: str | None = None  # of the run that ended last
    jobs: list[JobEntry] = field(default_factory=list)

    def job(self, hash: str) -> JobEntry | None:
        return next((job for job in self.jobs if job.hash == hash), None)

    def of(self, jobs: Sequence[JobEntry]) -> list[JobEntry]:
        """Returns the entries of jobs that were read earlier, as they are now."""
        now = {job.hash: job for job in self.jobs}
        return [now[job.hash] for job in jobs]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_dict(values: dict[str, Any]) -> "Manifest":
        known = {each.name for each in fields(JobEntry)}
        jobs = [JobEntry(**{key: value for key, value in job.items() if key in known}) for job in values["jobs"]]
        own = {each.name for each in fields(Manifest)} - {"jobs"}
        return Manifest(**{key: value for key, value in values.items() if key in own}, jobs=jobs)


def read_manifest(folder: str | Path) -> Manifest:
    """Reads the manifest of the sweep in `folder`.

    Raises:
        FileNotFoundError: the folder has no manifest.
        RunFolderError: the manifest is cut off or lacks a required key; one line.
    """
    file = Path(folder) / MANIFEST_FILE
    text = file.read_text(encoding="utf-8", errors="replace")
    try:
        return Manifest.from_dict(json.loads(text))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise RunFolderError(
            f"{file}: cannot be read as a sweep's manifest ({reason}); move it away and launch the sweep again: its "
            "jobs continue from their folders"
        ) from None


def lock_file(folder: Path, name: str) -> Path:
    """The file of a sweep's lock: "manifest", "report", or the hash of a job."""
    return folder / ".locks" / f"{name}.lock"


def was_killed(folder: Path, job: JobEntry) -> bool:
    """Whether the job's state is "running" and certainly no process runs it.

    Writes nothing, because the folder may be a copy or read-only. Returns False for jobs of other machines, whose
    locks may be invisible here.
    """
    if job.state != RUNNING or job.host != platform.node():
        return False
    try:
        import fcntl

        with open(lock_file(folder, job.hash), "rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)  # released when the file closes
        return True
    except (ImportError, OSError):  # the lock is held, or cannot be tested
        return False


def _now() -> str:
    return datetime.now().astimezone().isoformat(timespec="seconds")

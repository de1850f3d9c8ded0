"""manifest.json of a sweep, and the locks around it and its jobs.

Several processes may work on one sweep: a launcher's workers, or two launches at once. Whoever changes the manifest
holds its lock from reading to writing; whoever runs a job holds that job's lock, which the system takes back when the
process dies. So a job that is "running" while nobody holds its lock was killed: who launches the sweep again writes
that down, who reports looks for himself.
"""

import contextlib
import json
import platform
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from datetime import datetime
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from model.training import endings
from model.training.run_folder import RunFolderError
from model.training.storage import make_folder, write_json

WAITING, RUNNING, DONE, FAILED, INTERRUPTED = "waiting", "running", "done", "failed", "interrupted"
OUT_OF_MEMORY = endings.OUT_OF_MEMORY  # as the run's own summary says it

FILE = "manifest.json"

A_LOOK = 0.5
"""Seconds of patience for a job's lock: who looks whether somebody holds it (a report) holds it for a moment."""


@dataclass
class Job:
    """One run of a sweep."""

    hash: str  # of its config (config_hash)
    label: str  # what it differs in, without the seed
    overrides: list[str]  # of `python train.py`: all of them
    seed: int
    baseline: bool  # full attention
    folder: str  # relative to the manifest's
    command: str  # reproduces this run alone
    state: str = WAITING
    started: str | None = None  # ISO 8601, the first time
    ended: str | None = None
    seconds: float | None = None  # over all attempts, evaluation included
    exit_reason: str | None = None  # one line
    traceback: str | None = None
    host: str | None = None  # the machine that is at it, and of no interest afterwards

    @property
    def name(self) -> str:
        return f"{self.label} seed={self.seed}"

    def start(self) -> None:
        self.state, self.started = RUNNING, self.started or now()
        self.ended = self.exit_reason = self.traceback = None
        self.host = platform.node()

    def end(self, state: str, seconds: float, reason: str | None = None, traceback: str | None = None) -> None:
        self.state, self.ended, self.seconds = state, now(), (self.seconds or 0.0) + seconds
        self.exit_reason, self.traceback, self.host = reason, traceback, None


@dataclass
class Manifest:
    """What manifest.json holds."""

    sweep: str
    match: str | None  # tokens, time, flops
    budget: dict[str, float] | None  # {"tokens": ...}, {"seconds": ...} or {"flops": ...}
    command: str
    versions: dict[str, str | None]
    device: str | None = None  # of the run that ended last
    jobs: list[Job] = field(default_factory=list)

    def job(self, hash: str) -> Job | None:
        return next((job for job in self.jobs if job.hash == hash), None)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_dict(values: dict[str, Any]) -> "Manifest":
        known = {each.name for each in fields(Job)}
        jobs = [Job(**{key: value for key, value in job.items() if key in known}) for job in values["jobs"]]
        own = {each.name for each in fields(Manifest)} - {"jobs"}
        return Manifest(**{key: value for key, value in values.items() if key in own}, jobs=jobs)


def read_manifest(folder: str | Path) -> Manifest:
    """The manifest of the sweep in `folder`.

    Raises:
        FileNotFoundError: there is none.
        RunFolderError: it is cut off, or of a version that knows other keys; one line.
    """
    file = Path(folder) / FILE
    text = file.read_text(encoding="utf-8", errors="replace")
    try:
        return Manifest.from_dict(json.loads(text))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise RunFolderError(
            f"{file}: cannot be read as a sweep's manifest ({reason}); move it away, and the same command takes up its "
            "jobs from their folders"
        ) from None


@contextlib.contextmanager
def changing(folder: Path, new: Manifest | None = None) -> Iterator[Manifest]:
    """The manifest, to change: written when the block ends, and nobody else writes meanwhile. `new` is what to begin
    with where there is none yet."""
    with lock(folder, "manifest"):
        manifest = read_manifest(folder) if new is None or (folder / FILE).exists() else new
        yield manifest
        write_json(folder / FILE, manifest.to_dict())


@contextlib.contextmanager
def changing_job(folder: Path, hash: str) -> Iterator[Job]:
    """One job of it, to change."""
    with changing(folder) as manifest:
        job = manifest.job(hash)
        assert job is not None, hash
        yield job


def lock(folder: Path, name: str) -> FileLock:
    """A lock of the sweep in `folder`: "manifest", "report", or the hash of a job."""
    file = _lock_file(folder, name)
    make_folder(file.parent)
    return FileLock(file)


def _lock_file(folder: Path, name: str) -> Path:
    return folder / ".locks" / f"{name}.lock"


def was_killed(folder: Path, hash: str, host: str | None) -> bool:
    """Whether a job that is "running" by the manifest surely is not. It only looks, in folders that may be copies or
    not be ours to write, and says no where it cannot know: locks need not be seen from one machine to the next.

    host: where the job was begun.
    """
    if host != platform.node():
        return False
    try:
        import fcntl

        with open(_lock_file(folder, hash), "rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)  # given back with the file
        return True
    except (ImportError, OSError):  # held, among other reasons
        return False


def is_running(folder: Path, job: Job) -> bool:
    """Whether a process that lives is at this job."""
    held = lock(folder, job.hash)
    try:
        held.acquire(timeout=A_LOOK)
    except Timeout:
        return True
    held.release()
    return False


def now() -> str:
    return datetime.now().astimezone().isoformat(timespec="seconds")

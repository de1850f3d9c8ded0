"""The folder of one run: its config, metrics, checkpoints and results.

    outputs/<name>/<date_time_microseconds>/
      config.yaml   the whole config, resolved      metrics.csv    every logged number (metrics.py)
      summary.json  final quality and cost          checkpoints/   last.ckpt, best.ckpt (checkpoints.py)
      train.log     log messages                    report/        pictures
      wandb_id      the id of its wandb run         .lock          held by the process that trains

No file name holds a `=`, which Hydra's command line takes only in quotes. JSON is written to a temporary file and
renamed, so that a reader (a report, a sweep) always finds a whole file.
"""

import contextlib
import hashlib
import json
import logging
import os
import platform
import re
import secrets
import shlex
import sys
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout

from model.training.storage import make_folder, naming, write_atomically, write_json

log = logging.getLogger(__name__)


RUN_FOLDER = "FARSIGHT_RUN_FOLDER"
"""Environment variable with the run's folder. The first rank sets it for the other ranks, and a sweep for the process
of a job."""


LOCK_SECONDS = 10.0
"""How long a process waits for the lock of a run folder: data workers of a killed process can hold it for a few
seconds."""

TEST_RESULTS = ("loss", "bits_per_byte", "perplexity", "loss_first_512", "loss_last_quarter")
"""Entries of summary.json that the evaluation after training writes. They are removed when training starts again."""


class RunFolderError(ValueError):
    """A path that is not the run or the checkpoint that it should be."""


class RunFolder:
    """The paths of one run; reads and writes its small files. Made by `create` or `open`."""

    def __init__(self, path: str | Path):
        self.path = Path(path).expanduser().absolute()
        self.config_file = self.path / "config.yaml"
        self.summary_file = self.path / "summary.json"
        self.metrics_file = self.path / "metrics.csv"
        self.log_file = self.path / "train.log"
        self.checkpoints = self.path / "checkpoints"
        self.report = self.path / "report"

    @classmethod
    def create(cls, path: str | Path, config: dict[str, Any]) -> "RunFolder":
        """Makes the folder and writes config.yaml.

        Args:
            path: must not hold a run; see `new_run_path`.
            config: the whole resolved config, as plain dicts.
        """
        folder = cls(path)
        if "=" in str(folder.path):
            raise RunFolderError(f"run folder {str(folder.path)!r}: a path with '=' cannot be given to Hydra")
        if folder.config_file.exists():
            raise RunFolderError(f"{folder.path} already holds a run; continue it with: {resume_command(folder.path)}")
        make_folder(folder.checkpoints)
        write_atomically(folder.config_file, yaml.safe_dump(config, sort_keys=False, allow_unicode=True))
        return folder

    @classmethod
    def open(cls, path: str | Path) -> "RunFolder":
        """Opens an existing run.

        Raises:
            RunFolderError: there is no such folder, or it holds no run.
        """
        folder = cls(path)
        if not folder.path.is_dir():
            raise RunFolderError(f"no such run folder: {path}")
        if not folder.config_file.is_file():
            model = (
                f"; a model in Hugging Face's format is hf:{path}" if (folder.path / "config.json").is_file() else ""
            )
            raise RunFolderError(f"{path} is not a run folder: it holds no config.yaml{model}")
        return folder

    @classmethod
    def create_or_continue(cls, path: str | Path, config: dict[str, Any]) -> tuple["RunFolder", Path | None]:
        """Returns (the folder of the run of `config`, the last checkpoint of an earlier attempt or None). Of an attempt
        that saved no checkpoint only the log is kept."""
        folder = cls(path)
        if folder.goes_on:
            return folder, folder.checkpoints / "last.ckpt"
        for file in (folder.config_file, folder.summary_file, folder.metrics_file, folder.checkpoints / "best.ckpt"):
            file.unlink(missing_ok=True)
        return cls.create(path, config), None

    @classmethod
    def of_first_rank(cls, path: str | Path | None) -> tuple["RunFolder", Path | None]:
        """Returns (the folder that the first rank has opened, its last checkpoint or None), and writes nothing."""
        if path is None:
            raise RunFolderError(f"a further rank must find its run's folder in the environment variable {RUN_FOLDER}")
        folder = cls(path)
        last = folder.checkpoints / "last.ckpt"
        return folder, last if last.is_file() else None

    @property
    def goes_on(self) -> bool:
        """Whether a run in this folder has saved a checkpoint, from which it continues."""
        return self.config_file.is_file() and (self.checkpoints / "last.ckpt").is_file()

    def read_config(self) -> dict[str, Any]:
        return yaml.safe_load(self.config_file.read_text(encoding="utf-8"))

    def replace_config(self, config: dict[str, Any]) -> None:
        """Writes a resumed run's config to config.yaml, without `resume`, and logs each setting that changes."""
        before = self.read_config()
        after = config | {"resume": None} | {key: before[key] for key in ("trust",) if key in before}
        changes = changed_settings(before, after)
        if changes:
            had, has = _flat(before), _flat(after)
            for key, (old, new) in changes.items():
                if key in had and key in has:  # else a version after the run's renamed, removed or added it
                    log.info("resumed with %s=%s, was %s", key, new, old)
            write_atomically(self.config_file, yaml.safe_dump(after, sort_keys=False, allow_unicode=True))

    def finished_as(self, config: dict[str, Any], saved: dict[str, Any], checkpoint: Path) -> dict[str, Any] | None:
        """Returns the summary of a run that has finished with these settings, if `checkpoint` is its last one:
        there is nothing left to train or to evaluate. None otherwise. `saved`: the run's config.yaml under the current
        names of its keys."""
        summary = self.read_summary()
        is_last = checkpoint.absolute() == self.checkpoints / "last.ckpt"
        if summary.get("state") != "finished" or not is_last or changed_settings(saved, config):
            return None
        return summary

    def read_summary(self) -> dict[str, Any]:
        return json.loads(self.summary_file.read_text(encoding="utf-8")) if self.summary_file.exists() else {}

    def write_summary(self, **values: Any) -> dict[str, Any]:
        """Sets these entries of summary.json, keeps the others, and returns all of them."""
        summary = self.read_summary() | values
        write_json(self.summary_file, summary)
        return summary

    def mark_failed(self) -> None:
        """Overwrites the state "running" in summary.json in place, which needs no space on a full disk."""
        with contextlib.suppress(OSError), open(self.summary_file, "r+b") as file:
            before, running, _ = file.read().partition(b'"state": "running"')
            if running:
                file.seek(len(before))
                file.write(b'"state": "failed" ')

    def start_summary(self, **values: Any) -> None:
        """Writes summary.json at the start of training, without the results of an earlier evaluation."""
        kept = {key: value for key, value in self.read_summary().items() if key not in TEST_RESULTS}
        write_json(self.summary_file, kept | values)

    def wandb_id(self) -> str:
        """Returns the id of the run's wandb run, which is created once and kept in the folder."""
        file = self.path / "wandb_id"
        if not file.is_file():
            write_atomically(file, secrets.token_hex(4))
        return file.read_text().strip()

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """While inside, no other process trains in this folder.

        The operating system releases the lock when the process ends, however it ends.

        Raises:
            RunFolderError: another process holds the lock.
        """
        make_folder(self.path)
        owner = self.path / ".lock_owner"
        try:
            lock = FileLock(self.path / ".lock").acquire(timeout=LOCK_SECONDS)
        except Timeout:
            holder = owner.read_text().strip() if owner.is_file() else "unknown"
            raise RunFolderError(f"{self.path}: another process trains in this run folder ({holder})") from None
        with lock:
            owner.write_text(f"process {os.getpid()} on {platform.node()}\n")
            try:
                yield
            finally:
                owner.unlink(missing_ok=True)

    @contextlib.contextmanager
    def logging_to_file(self) -> Iterator[None]:
        """While inside, Python logging of level INFO and above also goes to train.log (appended)."""
        with naming(self.log_file):
            handler = _LogFile(self.log_file, encoding="utf-8")
        handler.setLevel(logging.INFO)
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        root = logging.getLogger()
        level = root.level
        root.addHandler(handler)
        root.setLevel(min(level, logging.INFO) if level else logging.INFO)
        try:
            yield
        finally:
            root.removeHandler(handler)
            root.setLevel(level)
            handler.close()


class _LogFile(logging.FileHandler):
    """Appends log records. On a full disk each lost record is one line on standard error, and the run goes on."""

    def handleError(self, record: logging.LogRecord) -> None:
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            return super().handleError(record)
        sys.stderr.write(f"{self.baseFilename}: cannot be written: {error.strerror}\n")


@contextlib.contextmanager
def telling_other_ranks(folder: RunFolder) -> Iterator[None]:
    """While inside, processes that this one starts find the run's folder in their environment."""
    before = os.environ.get(RUN_FOLDER)
    os.environ[RUN_FOLDER] = str(folder.path)
    try:
        yield
    finally:
        del os.environ[RUN_FOLDER]
        if before is not None:
            os.environ[RUN_FOLDER] = before


def new_run_path(root: str | Path, name: str) -> Path:
    """Returns <root>/<name>/<date_time_microseconds>. Jobs of a sweep may start within the same second."""
    if not re.fullmatch(r"[\w.+-]+(/[\w.+-]+)*", name) or ".." in name:
        raise RunFolderError(f"name={name!r} becomes a folder: use letters, digits, '_', '-', '.', '+', '/' between")
    return Path(root) / name / datetime.now().strftime("%Y-%m-%d_%H-%M-%S_%f")


def resume_command(path: str | Path) -> str:
    """Returns the command that continues the run in `path`, quoted for Hydra and for a POSIX shell."""
    value = str(path)
    if not re.fullmatch(r"[\w./+-]+", value, re.ASCII):  # other characters may have a meaning in Hydra's grammar
        value = re.sub(r"(\\*)('|$)", lambda end: end[1] * 2 + ("\\'" if end[2] else ""), value)
        value = f"'{value}'"
    return f"python train.py {shlex.quote(f'resume={value}')}"


def find_checkpoint(path: str | Path, prefer: str = "best") -> Path:
    """Returns the checkpoint file of a path that a user gives.

    Args:
        path: RUN_DIR, RUN_DIR/last, RUN_DIR/best, or a .ckpt file.
        prefer: the checkpoint of a bare run folder, "last" or "best"; where it is missing, the other one.

    Raises:
        RunFolderError: there is no such run or checkpoint.
    """
    path = Path(path).expanduser()
    if path.is_file():
        return path
    if path.is_dir():
        folder = RunFolder.open(path)
        for name in dict.fromkeys((prefer, "best", "last")):
            if (folder.checkpoints / f"{name}.ckpt").is_file():
                return folder.checkpoints / f"{name}.ckpt"
        raise RunFolderError(f"{path} is a run folder without a checkpoint: it stopped before saving one")
    if path.name in ("last", "best") and path.parent.is_dir():
        file = RunFolder.open(path.parent).checkpoints / f"{path.name}.ckpt"
        if file.is_file():
            return file
        raise RunFolderError(f"{path.parent} has no checkpoints/{path.name}.ckpt")
    raise RunFolderError(f"no checkpoint at {path}: give a run folder, RUN_DIR/last, RUN_DIR/best or a .ckpt file")


def folder_of(checkpoint: Path) -> Path:
    """Returns the run folder of a checkpoint; the folder of the file itself if it lies in no run."""
    checkpoint = checkpoint.absolute()
    run = checkpoint.parent.parent
    return run if (run / "config.yaml").is_file() else checkpoint.parent


NO_SETTINGS = ("name", "outputs", "resume", "preflight", "trust")
"""Keys that do not change what a run trains: its name and place, its preflight, and options of one command."""


def config_hash(config: dict[str, Any]) -> str:
    """Returns 12 hex digits that change with any setting, except `NO_SETTINGS`."""
    settings = {key: value for key, value in config.items() if key not in NO_SETTINGS}
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()[:12]


def changed_settings(before: dict[str, Any], after: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Returns {dotted key: (value before, value after)} of every setting that differs, `NO_SETTINGS` excepted. A key
    that one of the two lacks counts as null there."""
    one, other = (
        _flat({key: value for key, value in config.items() if key not in NO_SETTINGS}) for config in (before, after)
    )
    keys = dict.fromkeys([*one, *other])
    return {key: (one.get(key), other.get(key)) for key in keys if one.get(key) != other.get(key)}


def check_writable(folder: Path, output: str | None) -> None:
    """Raises RunFolderError unless files can be written into `folder`, which need not exist yet. `output`: the value of
    the setting that chose it."""
    place = folder.absolute()
    while not place.exists() and place != place.parent:
        place = place.parent
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        given = "null" if output is None else output
        raise RunFolderError(
            f"output={given}: must be a path that can be written; {place} cannot, give output=ELSEWHERE"
        )


def _flat(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings under their dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {f"{prefix}{key}": value}
    return flat

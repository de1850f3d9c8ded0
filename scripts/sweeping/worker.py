"""Runs one job of a sweep and writes its outcome to the manifest, in any process that a launcher chooses.

A launcher calls `Worker` with the composed config: in the sweep's own process, in one of joblib's, or on a cluster's
node. Jobs that need a process of their own get it from own_process.py, where `run_as_job` runs them.
"""

import contextlib
import logging
import multiprocessing
import os
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import Timeout
from omegaconf import DictConfig

from data.units import quality_in, units_in
from model.training.run_folder import RUN_FOLDER, RunFolder, config_hash
from model.training.signals import hand_on
from scripts.console import is_for_users, one_line, start_logging
from scripts.reporting.manifest import DONE, FAILED, INTERRUPTED, OUT_OF_MEMORY, RUNNING, read_manifest
from scripts.sweeping.locks import LOCK_TIMEOUT, changing, changing_job, lock
from scripts.sweeping.own_process import JOB_TITLE, PARENT_PROCESS, run_in_own_process, starts_ranks
from scripts.sweeping.parent_watchdog import ending_with_parent

log = logging.getLogger(__name__)

Train = Callable[[dict[str, Any], Path], dict[str, Any]]
"""Trains a resolved config in a run folder and returns the run's summary: `train` of train.py, which imports us."""

stopped: list[bool] = []
"""Not empty once the user has stopped a job of this process, a worker of joblib's."""


@dataclass(frozen=True)
class Worker:
    """Runs one job. A launcher calls it with the job's composed config, often in another process.

    joblib and submitit send it there with cloudpickle, so `train` may be a function of `__main__`.
    """

    train: Train
    folder: Path  # the sweep's
    numbers: dict[str, str]  # {config hash: "3/7"}
    isolate: bool = False

    def __call__(self, config: DictConfig) -> None:
        """Raises KeyboardInterrupt if the user stopped the job, so that no other starts. The manifest has the rest. A
        preempted job of submitit is requeued."""
        sweep = multiprocessing.parent_process()  # None in the sweep itself and on a cluster
        if sweep is None:
            if self._run(config):
                hand_on()
                raise KeyboardInterrupt
            return
        # An exception here makes joblib kill the other workers before they have saved. A worker that was stopped
        # accepts the remaining jobs instead and leaves them waiting.
        with ending_with_parent(sweep.pid):
            if not stopped and self._run(config):
                stopped.append(True)

    def _run(self, config: DictConfig) -> bool:
        """Runs the job. Returns whether the user stopped it."""
        from lightning.pytorch.utilities import rank_zero_only

        from configs.resolve import resolve

        start_logging()
        settings = resolve(config)
        hash = config_hash(settings)
        job = read_manifest(self.folder).job(hash)
        if job is None:
            raise RuntimeError(f"{self.folder}: no job has the config hash {hash}; the code may have changed")
        if rank_zero_only.rank != 0:  # another task of the same job on a cluster
            self.train(settings, self.folder / hash)
            return False
        title = f"job {self.numbers.get(hash, '?')} {job.name}:"
        if self.isolate or starts_ranks(settings["trainer"]):
            return run_in_own_process(self.folder, job, title)
        return run_job(self.train, self.folder, hash, settings, title) == INTERRUPTED


def run_as_job(settings: dict[str, Any], train: Train) -> int:
    """Runs the job of this process, which `run_in_own_process` has started. Returns the exit status."""
    path = Path(os.environ[RUN_FOLDER])
    with ending_with_parent(int(os.environ[PARENT_PROCESS])):
        state = run_job(train, path.parent, path.name, settings, os.environ.get(JOB_TITLE, path.name))
    return {DONE: 0, INTERRUPTED: 130}.get(state, 1)


def run_job(train: Train, folder: Path, hash: str, settings: dict[str, Any], title: str) -> str:
    """Runs a job in this process and writes its outcome to the manifest.

    Skips a job that another process runs or has finished.

    Args:
        folder: the sweep's folder.
        settings: the job's config, resolved, as plain dicts.
        title: names the job in log lines.

    Returns:
        The job's state.
    """
    try:
        held = lock(folder, hash).acquire(timeout=LOCK_TIMEOUT)
    except Timeout:
        log.info("%s runs in another process", title)
        return RUNNING
    with held:
        with changing_job(folder, hash) as job:
            if job.state == DONE:
                log.info("%s already done", title)
                return DONE
            job.start()
        began = time.perf_counter()
        state, reason, trace, summary = _attempt(train, folder / hash, settings, title)
        seconds = time.perf_counter() - began
        with changing(folder) as manifest:
            manifest.job(hash).end(state, seconds, reason, trace)
            manifest.device = summary.get("device") or manifest.device
        log.info("%s %s after %.0f s: %s", title, state, seconds, _result(summary) if state == DONE else reason)
    _free_process_state()
    report(folder)
    return state


def _result(summary: dict[str, Any]) -> str | None:
    """Returns the quality of a run with its unit, as "0.7162 bits per byte"; None if it was not measured."""
    units = units_in(summary)
    quality = quality_in(units)
    return None if summary.get(quality) is None else f"{summary[quality]:.4f} {units[quality]}"


def _attempt(
    train: Train, path: Path, settings: dict[str, Any], title: str
) -> tuple[str, str | None, str | None, dict[str, Any]]:
    """Trains in the run folder `path`. Returns the job's state, reason and traceback, and the run's summary.

    An error with a message for users has no traceback here: its reason is enough. train.log has that of any error.
    """
    try:
        last = path / "checkpoints" / "last.ckpt"
        log.info("%s %s", title, "resumes from its last checkpoint" if last.exists() else "starts")
        summary = train(settings, path)
    except KeyboardInterrupt:
        return INTERRUPTED, "stopped before it could save", None, {}
    except (Exception, SystemExit) as error:
        trace = traceback.format_exc()
        with contextlib.suppress(OSError):  # the disk may be full
            path.mkdir(parents=True, exist_ok=True)
            with open(path / "train.log", "a", encoding="utf-8") as file:
                file.write(trace)
        summary = RunFolder(path).read_summary()
        state = OUT_OF_MEMORY if _out_of_memory(error) else FAILED
        return state, reason_of(error), None if is_for_users(error) else trace, summary
    if summary["state"] == INTERRUPTED:
        return INTERRUPTED, f"stopped at step {summary['step']}", None, summary
    return DONE, None, None, summary


def reason_of(error: BaseException) -> str:
    """Returns why a job failed, in one line. Errors for users appear without the name of their class."""
    return one_line(error) if is_for_users(error) else f"{type(error).__name__}: {one_line(error)}"


def _out_of_memory(error: BaseException) -> bool:
    from model.training.failures import OUT_OF_MEMORY as STATE
    from model.training.failures import RunOutOfMemoryError, is_out_of_memory

    of_rank = getattr(error, "state", None) == STATE  # RankLostError
    return of_rank or isinstance(error, RunOutOfMemoryError) or is_out_of_memory(error)


def _free_process_state() -> None:
    """Frees memory and compiled code for the next job, which would otherwise reach the recompilation limit."""
    if "torch._dynamo" in sys.modules:
        sys.modules["torch._dynamo"].reset()
    if "wandb" in sys.modules:
        sys.modules["wandb"].finish()
    import torch

    from model.training.memory_use import give_back_free_memory

    give_back_free_memory()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def report(folder: Path) -> None:
    """Writes the sweep's report. A failure is logged in one line, because the jobs matter more."""
    try:
        from scripts.reporting.write import write_report  # imports matplotlib, which most processes don't need

        with lock(folder, "report"):
            write_report([folder])
    except Exception as error:
        log.warning("no report of %s: %s: %s", folder, type(error).__name__, one_line(error))

"""One job of a sweep, from waiting to done, in whatever process it finds itself.

A launcher calls `Worker` with the composed config: in the sweep's own process, in one of joblib's, or on a cluster's
node. A job that wants several devices gets a process of its own (so does every job under sweep.isolate=true): Lightning
starts the other ranks by running that process's own command line again, which must be the job's and never the sweep's,
and ends the process where a rank fails.
"""

import contextlib
import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import Timeout
from omegaconf import DictConfig

from model.training.interrupt import SIGNALS
from model.training.run_folder import RUN_FOLDER, RunFolder, config_hash
from scripts.console import is_for_users, one_line, start_logging
from scripts.sweeping import manifest as records
from scripts.sweeping.manifest import DONE, FAILED, INTERRUPTED, OUT_OF_MEMORY, RUNNING, changing, changing_job
from scripts.sweeping.orphans import bound_to

log = logging.getLogger(__name__)

ROOT = Path(__file__).parents[2]

_stopped: list[bool] = []
"""Whether somebody stopped a job of this process, one of joblib's workers."""


Train = Callable[[dict[str, Any], Path], dict[str, Any]]
"""Trains a resolved config in a run folder and returns the run's summary: train.train, which imports this package."""


@dataclass(frozen=True)
class Worker:
    """Runs one job. A launcher calls it with the job's composed config, often in another process.

    It is pickled for that process, by cloudpickle in joblib and submitit: `train` may be a function of `__main__`.
    """

    train: Train
    folder: Path
    numbers: dict[str, str]  # by config hash: "3/7"
    isolate: bool = False

    def __call__(self, config: DictConfig) -> None:
        """How the job ended is in the manifest. Raises KeyboardInterrupt where somebody stopped it: no other must
        start."""
        sweep = multiprocessing.parent_process()  # of joblib's workers; None in the sweep itself and on a cluster
        if sweep is None:
            if self._run(config):
                raise KeyboardInterrupt
            return
        # An exception would have joblib kill the other workers, before they have saved: stopped, this one takes the
        # jobs that are left and leaves them as they are.
        with bound_to(sweep.pid):
            if not _stopped and self._run(config):
                _stopped.append(True)

    def _run(self, config: DictConfig) -> bool:
        """Whether somebody stopped it."""
        from lightning.pytorch.utilities import rank_zero_only

        from scripts.console import resolve

        start_logging()
        settings = resolve(config)
        hash = config_hash(settings)
        job = records.read_manifest(self.folder).job(hash)
        if job is None:
            raise RuntimeError(f"{self.folder} knows no job of config {hash}: is this another version of the code?")
        if rank_zero_only.rank != 0:  # a cluster's further task of the same job
            self.train(settings, self.folder / hash)
            return False
        say = f"job {self.numbers.get(hash, '?')} {job.name}:"
        if self.isolate or _wants_ranks(settings["trainer"]):
            return _run_apart(self.folder, job, say)
        return run_job(self.train, self.folder, hash, settings, say) == INTERRUPTED


def run_job(train: Train, folder: Path, hash: str, settings: dict[str, Any], say: str) -> str:
    """Runs the job in this process and writes down how it ended. Returns its state; a job that another process is at,
    or has done meanwhile, is left to it.

    folder: the sweep's. settings: the job's config, resolved, as plain dicts. say: how the job is called in the log.
    """
    try:
        held = records.lock(folder, hash).acquire(timeout=records.A_LOOK)
    except Timeout:
        log.info("%s runs in another process", say)
        return RUNNING
    with held:
        with changing_job(folder, hash) as job:
            if job.state == DONE:
                log.info("%s done already", say)
                return DONE
            job.start()
        began = time.perf_counter()
        state, reason, trace, summary = _attempt(train, folder / hash, settings, say)
        seconds = time.perf_counter() - began
        with changing(folder) as manifest:
            manifest.job(hash).end(state, seconds, reason, trace)
            manifest.device = summary.get("device") or manifest.device
        quality = summary.get("bits_per_byte")
        found = f"{quality:.4f} bits per byte" if state == DONE and quality is not None else reason
        log.info("%s %s after %.0f s: %s", say, state, seconds, found)
    _tidy()
    report(folder)
    return state


def _attempt(
    train: Train, path: Path, settings: dict[str, Any], say: str
) -> tuple[str, str | None, str | None, dict[str, Any]]:
    """State, reason, traceback and summary of the run in `path`."""
    try:
        last = path / "checkpoints" / "last.ckpt"
        log.info("%s %s", say, "goes on from its last checkpoint" if last.exists() else "starts")
        summary = train(settings, path)
    except KeyboardInterrupt:
        return INTERRUPTED, "stopped before it could save", None, {}
    except (Exception, SystemExit) as error:
        trace = traceback.format_exc()
        with contextlib.suppress(OSError):  # the disk may be full; the manifest has it as well
            path.mkdir(parents=True, exist_ok=True)
            with open(path / "train.log", "a", encoding="utf-8") as file:
                file.write(trace)
        summary = RunFolder(path).read_summary()
        memory = _out_of_memory(error)
        return OUT_OF_MEMORY if memory else FAILED, reason_of(error), trace, summary
    if summary["state"] == INTERRUPTED:
        return INTERRUPTED, f"stopped at step {summary['step']}", None, summary
    return DONE, None, None, summary


def reason_of(error: BaseException) -> str:
    """Why a job failed, in a line; what is meant for users says it without the name of the error."""
    return one_line(error) if is_for_users(error) else f"{type(error).__name__}: {one_line(error)}"


def _out_of_memory(error: BaseException) -> bool:
    from model.training.endings import RunOutOfMemoryError, is_out_of_memory

    return isinstance(error, RunOutOfMemoryError) or is_out_of_memory(error)


def _tidy() -> None:
    """Leaves the process to the next job as it was found, as far as that goes: memory is given back, compiled code
    forgotten (or the next job would hit the limit of recompilations)."""
    if "torch._dynamo" in sys.modules:
        sys.modules["torch._dynamo"].reset()
    if "wandb" in sys.modules:
        sys.modules["wandb"].finish()
    import torch

    from model.training.efficiency import give_back_free_memory

    give_back_free_memory()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def report(folder: Path) -> None:
    """Writes the sweep's report; a failure is one line, and no more."""
    try:
        from scripts.reporting.write import write_report

        with records.lock(folder, "report"):
            write_report([folder])
    except Exception as error:
        log.warning("no report of %s: %s: %s", folder, type(error).__name__, one_line(error))


# A process of its own


def _wants_ranks(trainer: dict[str, Any]) -> bool:
    """Whether Lightning would start further processes; a cluster's tasks are there already."""
    return trainer["devices"] != 1 and int(os.environ.get("SLURM_NTASKS", 1)) == 1


def own_command(job: records.Job) -> list[str]:
    """The job's command line: what this process runs, and Lightning again for every further rank."""
    return [sys.executable, str(ROOT / "train.py"), *job.overrides]


def _run_apart(folder: Path, job: records.Job, say: str) -> bool:
    """`python train.py <overrides>` with the job's folder in the environment, which makes it `run_as_job` there.
    Returns whether somebody stopped it, or the sweep while it ran.

    It is a process group of its own, so that a terminal's Ctrl-C reaches it through `_wait` alone, and once.
    """
    environment = os.environ | {RUN_FOLDER: str(folder / job.hash), SAY: say, PARENT: str(os.getpid())}
    status, stopped = _wait(subprocess.Popen(own_command(job), env=environment, process_group=0))
    with changing(folder) as manifest:
        ended = manifest.job(job.hash)
        if ended.state not in (DONE, INTERRUPTED, FAILED, OUT_OF_MEMORY) and not records.is_running(folder, ended):
            how = signal.Signals(-status).name if status < 0 else f"status {status}"
            hint = ", as when the system has no memory left" if how == "SIGKILL" else ""
            ended.end(INTERRUPTED if stopped else FAILED, 0.0, f"its process ended with {how}{hint}")
            log.info("%s %s: %s", say, ended.state, ended.exit_reason)
        return stopped or ended.state == INTERRUPTED


SAY = "FARSIGHT_JOB"
"""Environment variable: how the job is called in the log."""

PARENT = "FARSIGHT_SWEEP"
"""Environment variable: the process that waits for the job."""


def run_as_job(settings: dict[str, Any], train: Train) -> int:
    """In the process that `_run_apart` has started: the exit status."""
    path = Path(os.environ[RUN_FOLDER])
    with bound_to(int(os.environ[PARENT])):
        state = run_job(train, path.parent, path.name, settings, os.environ.get(SAY, path.name))
    return {DONE: 0, INTERRUPTED: 130}.get(state, 1)


def _wait(process: subprocess.Popen) -> tuple[int, bool]:
    """Exit status, and whether somebody stopped it. Ctrl-C, SIGTERM and SIGUSR1 go on to it and to all that it has
    started: it saves, and ends by itself; a second Ctrl-C ends it at once."""
    stopped = False

    def stop(number: int, _: object = None) -> None:
        nonlocal stopped
        stopped = True
        with contextlib.suppress(ProcessLookupError):  # it has ended meanwhile
            os.killpg(process.pid, number)

    if threading.current_thread() is not threading.main_thread():  # Python allows handlers nowhere else
        return process.wait(), stopped
    before = {number: signal.signal(number, stop) for number in SIGNALS}
    try:
        return process.wait(), stopped
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

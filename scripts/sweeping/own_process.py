"""Runs one job of a sweep in a process of its own: `python train.py <overrides>`.

A job on several devices needs one: Lightning starts the other ranks by running its own process's command line again,
which must be the job's command and not the sweep's, and it ends the process when a rank fails. `sweep.isolate=true`
gives every job its own process.
"""

import contextlib
import logging
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

from model.training.run_folder import RUN_FOLDER
from model.training.signals import SIGNALS, remember
from scripts.console import ROOT
from scripts.reporting.manifest import DONE, FAILED, INTERRUPTED, OUT_OF_MEMORY, JobEntry
from scripts.sweeping.locks import changing, is_running

log = logging.getLogger(__name__)

JOB_TITLE = "FARSIGHT_JOB"
"""Environment variable with the job's title in log lines."""

PARENT_PROCESS = "FARSIGHT_SWEEP"
"""Environment variable with the id of the process that waits for the job."""


def starts_ranks(trainer: dict[str, Any]) -> bool:
    """Whether Lightning would start further processes. On a cluster SLURM has started them already."""
    return trainer["devices"] != 1 and int(os.environ.get("SLURM_NTASKS", 1)) == 1


def run_in_own_process(folder: Path, job: JobEntry, title: str) -> bool:
    """Runs `python train.py <overrides>`. train.py calls worker.run_as_job because RUN_FOLDER is set.

    The process leads its own process group, so that Ctrl-C in a terminal reaches it once, through `wait`.

    Args:
        folder: the sweep's folder.
        title: names the job in log lines.

    Returns:
        Whether the user stopped the job, or the sweep while the job ran.
    """
    environment = os.environ | {
        RUN_FOLDER: str(folder / job.hash),
        JOB_TITLE: title,
        PARENT_PROCESS: str(os.getpid()),
    }
    command = [sys.executable, str(ROOT / "train.py"), *job.overrides]
    status, stopped = wait(subprocess.Popen(command, env=environment, process_group=0))
    with changing(folder) as manifest:
        ended = manifest.job(job.hash)
        if ended.state not in (DONE, INTERRUPTED, FAILED, OUT_OF_MEMORY) and not is_running(folder, ended):
            how = signal.Signals(-status).name if status < 0 else f"status {status}"
            hint = ", perhaps because the system ran out of memory" if how == "SIGKILL" else ""
            ended.end(INTERRUPTED if stopped else FAILED, 0.0, f"its process ended with {how}{hint}")
            log.info("%s %s: %s", title, ended.state, ended.exit_reason)
        return stopped or ended.state == INTERRUPTED


def wait(process: subprocess.Popen) -> tuple[int, bool]:
    """Waits for the process. Returns its exit status, and whether the user stopped it.

    Signals that end a run are forwarded to its process group: it saves and ends; a second Ctrl-C ends it at once.
    """
    stopped = False

    def stop(number: int, _: object = None) -> None:
        nonlocal stopped
        stopped = True
        remember(number)
        with contextlib.suppress(ProcessLookupError):  # the process has just ended
            os.killpg(process.pid, number)

    if threading.current_thread() is not threading.main_thread():  # Python allows signal handlers nowhere else
        return process.wait(), stopped
    before = {number: signal.signal(number, stop) for number in SIGNALS}
    try:
        return process.wait(), stopped
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

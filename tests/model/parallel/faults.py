"""Runs on two ranks, one of which meets a fault at the start of a step.

Rank 0 is forked from a server that has imported what a run needs, and rank 1 from rank 0: new processes take ten times
as long. All else is as in a user's run: signals, the ends of processes, and the lines on the screen.
"""

import contextlib
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import lightning
import torch
from lightning.pytorch.utilities import rank_zero_only

from model.training import ranks
from model.training.failures import LayoutOverflowError
from model.training.run_folder import RunFolder
from scripts.console import run, user_errors
from tests.commands import Signalled
from tests.model.parallel.training import train

STEPS = 10


@dataclass(frozen=True)
class Ended:
    """How a run ended: the exit status of rank 0, negative for a signal, and the lines on the screen."""

    status: int | None
    lines: list[str]
    summary: dict[str, Any]


class Fault(lightning.Callback):
    def __init__(self, fault: str, rank: int | None, step: int) -> None:
        self.fault, self.rank, self.step = fault, rank, step  # rank None: all ranks

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        if self.rank not in (None, trainer.global_rank) or trainer.global_step != self.step:
            return
        if self.fault == "out of memory":
            raise torch.OutOfMemoryError("out of memory: 7.00 GiB are missing")
        if self.fault == "error":
            raise LayoutOverflowError("document 17 is too large")
        if self.fault == "bug":
            raise AttributeError("a bug")
        if self.fault == "Ctrl-C":
            os.killpg(0, signal.SIGINT)
        else:
            os.kill(os.getpid(), getattr(signal, self.fault))


def run_with_fault(path: Path, **settings: Any) -> Ended:
    """Trains, or resumes a run that has a checkpoint. `settings`: fault, rank and step, and others of `train`."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    screen = path.with_suffix(".screen")
    process = context.Process(target=_rank_0, args=(path, screen, settings))
    process.start()
    process.join(120)
    end = time.monotonic() + 30
    while ranks_of(path) and time.monotonic() < end:
        time.sleep(0.05)
    assert not ranks_of(path), "a rank has not ended"
    lines = [line for line in screen.read_text().splitlines() if line]
    return Ended(process.exitcode, lines, RunFolder(path).read_summary())


def ranks_of(path: Path) -> list[int]:
    """The processes of the run that have not ended."""
    found = []
    for rank in (path / "processes").iterdir():
        with contextlib.suppress(FileNotFoundError):
            status = Path(f"/proc/{rank.read_text()}/stat").read_text().rpartition(")")[2].split()[0]
            found += [int(rank.name)] if status not in "ZX" else []
    return found


def _rank_0(path: Path, screen: Path, settings: dict[str, Any]) -> None:
    os.setsid()  # a group of processes, as a terminal makes for a command
    with open(screen, "wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    launcher = "lightning.pytorch.strategies.launchers.subprocess_script.subprocess"
    popen = ForkedRank.started_by(lambda: _train(path, **settings))
    with mock.patch(launcher, SimpleNamespace(Popen=popen)), mock.patch.object(ranks, "GRACE_SECONDS", 2.0):
        _train(path, **settings)


def _train(path: Path, fault: str | None = None, rank: int | None = 0, step: int = 0, **settings: Any) -> None:
    """As train.py: one line for an error, and KeyboardInterrupt for a run that was interrupted and saved."""
    torch.set_num_threads(1)
    (path / "processes").mkdir(parents=True, exist_ok=True)
    (path / "processes" / str(rank_zero_only.rank)).write_text(str(os.getpid()))
    callbacks = [Fault(fault, rank, step)] if fault else []
    settings = dict(devices=2, strategy="ddp", max_steps=STEPS, save_every=1, validate_every=None) | settings

    def main() -> None:
        with user_errors():
            train(path, resume=(path / "checkpoints/last.ckpt").exists(), callbacks=callbacks, **settings)
            if RunFolder(path).read_summary()["state"] == "interrupted":
                raise KeyboardInterrupt

    run(main)


class ForkedRank(Signalled):
    """A process with the interface of subprocess.Popen, forked from this one."""

    def __init__(self, main: Callable[[], None], command: Any, env: dict[str, str], cwd: Any) -> None:
        self.returncode: int | None = None
        self.pid = os.fork()
        if self.pid:
            return
        status = 1
        try:
            os.environ.update(env)
            rank_zero_only.rank = int(env["LOCAL_RANK"])
            main()
            status = 0
        except SystemExit as stop:
            status = int(stop.code or 0)
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            os._exit(status)

    @classmethod
    def started_by(cls, main: Callable[[], None]) -> Callable[..., "ForkedRank"]:
        return lambda command, env, cwd: cls(main, command, env, cwd)

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

"""The ranks of a run on several devices end together.

Rank 0 is the process that the user starts. It starts the other ranks with the same command, unless srun or torchrun has
started all of them. When a rank ends early, the others wait for it in gloo or NCCL, some of them for ever. So each
rank has a thread that detects the end of the others:

    killed      Rank 0 polls the processes that it has started, and these poll rank 0.
    failed      The first rank with an error writes it to the run folder (FAILURE_FILE), where every rank finds it.
    hangs       No rank finishes a batch, because each waits for the others. The limit is trainer.rank_timeout. Ranks
                that wait for one another at the start have the limit of gloo and NCCL.

One rank reports the end, in one line. The main thread usually gets an error of gloo or NCCL, and raises RankLostError
in its place. If the main thread still waits after GRACE_SECONDS, the thread ends the process.
"""

import json
import logging
import os
import signal
import subprocess
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies.launchers.subprocess_script import _SubprocessScriptLauncher
from lightning.pytorch.utilities import rank_zero_only

from model.training.failures import OUT_OF_MEMORY, is_out_of_memory
from model.training.interrupt import Interrupted
from model.training.run_folder import RunFolder, resume_command

log = logging.getLogger(__name__)

POLL_SECONDS = 0.2
GRACE_SECONDS = 5.0
"""Time in which a main thread can end by itself after another rank has ended."""
EXIT_SECONDS = 60.0
"""Time in which a process can exit after its main thread has failed."""

FAILURE_FILE = ".failure.json"
"""In the run folder: the rank that failed first, its error in one line, and the state of the run."""

FIRST_RANK = "FARSIGHT_FIRST_RANK"
"""Environment variable with the process id of rank 0, for the ranks that it starts."""

REPORTED, INTERRUPTED = 2, 130
"""Exit statuses of a process that has printed its error in one line, and of one that a signal has ended."""


class RankLostError(RuntimeError):
    """Another rank was killed, has failed or hangs.

    reported: another rank has printed the error, and this one prints nothing
    state: the state of the run, for summary.json
    """

    def __init__(self, line: str, reported: bool = False, state: str = "failed"):
        super().__init__(line)
        self.reported, self.state = reported, state


class Ranks(Callback):
    """Watches over the other ranks, from `start` to `stop`. It does nothing in a run on one device.

    folder: of the run. timeout: seconds without a finished batch after which the run counts as hanging.
    """

    def __init__(self, folder: RunFolder, timeout: float):
        self.folder, self.timeout = folder, timeout
        self.file = folder.path / FAILURE_FILE
        self.children: Sequence[subprocess.Popen] = ()  # the processes of ranks 1, 2, ... that this one has started
        self.parent: int | None = None  # the process of rank 0, if that has started this one
        self.rank = 0
        self.started = self.ending = self.first_to_fail = self.failed = False
        # Seconds since the last finished batch, without those in which this process was stopped; None before all ranks
        # have joined.
        self.idle: float | None = None
        self.cause: RankLostError | None = None
        self.found, self.stopped = threading.Event(), threading.Event()

    def prepare(self) -> None:
        """Removes what an earlier session wrote. Rank 0 calls it before it starts other ranks."""
        self.file.unlink(missing_ok=True)
        os.environ[FIRST_RANK] = str(os.getpid())

    def start(self, children: Sequence[subprocess.Popen]) -> None:
        """Begins the watch. `children`: the processes of ranks 1, 2, ... that this process has started."""
        if self.started:
            return
        self.rank, self.children, self.started = rank_zero_only.rank, children, True
        parent = os.environ.get(FIRST_RANK)
        self.parent = int(parent) if self.rank and parent else None
        self.earlier = self._written()  # the failure of an earlier session
        threading.Thread(target=self._watch, name="ranks", daemon=True).start()

    def stop(self, failed: bool) -> None:
        """Ends the watch. After a failure, rank 0 ends the processes that it has started and that have not ended."""
        self.failed = failed
        self.stopped.set()
        os.environ.pop(FIRST_RANK, None)
        if not failed:
            return
        # Before the other ranks are killed, one that has failed gets time to print its error.
        until = time.monotonic() + (GRACE_SECONDS if self.first_to_fail else 3 * GRACE_SECONDS)
        hopeless = self.cause is not None and not self.cause.reported
        while not hopeless and any(child.poll() is None for child in self.children) and time.monotonic() < until:
            time.sleep(POLL_SECONDS / 4)
        self._kill_children()

    def lost(self, error: BaseException) -> RankLostError | None:
        """Returns the end of another rank that caused `error`, and writes the error's traceback to train.log. Returns
        None if the error is this rank's own; its attribute `reported` is then whether another rank has reported one."""
        if not self.started:
            return None
        if not is_of_communication(error):
            error.reported = not self._is_first(error)  # pyrefly: ignore[missing-attribute]
            return None
        self.found.wait(GRACE_SECONDS)
        cause = self.cause or RankLostError(f"another rank has ended or hangs; {self._how_to_continue()}")
        if not cause.reported and not self._is_first(cause):
            cause = RankLostError(str(cause), reported=True)
        if self.rank == 0:
            with suppress(OSError), open(self.folder.log_file, "a", encoding="utf-8") as file:
                file.write(f"{cause}\n" + "".join(traceback.format_exception(error)))
        return cause

    # Called by Lightning

    def setup(self, *_: Any, **__: Any) -> None:
        self.idle = 0.0

    def on_train_start(self, *_: Any) -> None:
        self.idle = 0.0

    def on_train_batch_end(self, *_: Any) -> None:
        self.idle = 0.0

    def on_validation_batch_end(self, *_: Any) -> None:
        self.idle = 0.0

    def on_exception(self, trainer: Trainer, module: LightningModule, exception: BaseException) -> None:
        self.ending = True
        own = isinstance(exception, Exception) and not isinstance(exception, Interrupted)
        if self.started and own and not is_of_communication(exception):
            self._is_first(exception)

    # The thread

    def _watch(self) -> None:
        before = time.monotonic()
        while not self.stopped.wait(POLL_SECONDS):
            now = time.monotonic()
            if self.idle is not None:
                self.idle += min(now - before, 5 * POLL_SECONDS)  # more: this process was stopped
            before = now
            self.cause = self._find()
            if self.cause is None:
                continue
            self.found.set()
            if not self.stopped.wait(GRACE_SECONDS):
                self._end(self.cause)
            if self.failed:
                time.sleep(EXIT_SECONDS)  # the main thread exits, and may wait in NCCL's destructor
                os._exit(REPORTED)
            return  # this rank has finished: the other one failed while it exited

    def _find(self) -> RankLostError | None:
        written = self._written()
        if written is not None and written != self.earlier and written["rank"] != self.rank:
            return RankLostError(written["line"], True, written["state"])
        for rank, child in enumerate(self.children, 1):
            status = child.poll()
            if status and not self.ending:
                return self._ended(rank, status)
            if status and status != INTERRUPTED:  # `ending`: this rank may have an error of communication because of it
                return self._ended(rank, status)
        if self.parent is not None and os.getppid() != self.parent:
            return RankLostError(f"rank 0 has ended; {self._how_to_continue()}")
        if self.idle is not None and self.idle > self.timeout and not self.ending:
            seconds = f"no batch has ended for {self.timeout:g} s (trainer.rank_timeout={self.timeout:g})"
            return RankLostError(f"a rank hangs: {seconds}; {self._how_to_continue()}")
        return None

    def _ended(self, rank: int, status: int) -> RankLostError:
        how = f"has ended with exit status {status}"
        if status < 0:
            name = signal.Signals(-status).name
            hint = ", perhaps because the system ran out of memory" if name == "SIGKILL" else ""
            how = f"was ended by {name}{hint}"
        return RankLostError(f"rank {rank} {how}; {self._how_to_continue()}", status in (REPORTED, INTERRUPTED))

    def _how_to_continue(self) -> str:
        if (self.folder.checkpoints / "last.ckpt").is_file():
            return f"continue with: {resume_command(self.folder.path)}"
        return "no checkpoint had been saved before"

    def _end(self, cause: RankLostError) -> None:
        """Ends this process, whose main thread waits for another rank."""
        if not cause.reported and self._is_first(cause):
            log.error(str(cause))
        if self.rank == 0:
            self.folder.mark_failed()
        self._kill_children()
        until = time.monotonic() + 2 * GRACE_SECONDS
        while self.parent is not None and os.getppid() == self.parent:  # rank 0 ends by itself, unless it hangs
            if time.monotonic() > until:
                with suppress(ProcessLookupError):
                    os.kill(self.parent, signal.SIGKILL)
                break
            time.sleep(POLL_SECONDS)
        logging.shutdown()
        os._exit(REPORTED)

    def _kill_children(self) -> None:
        for child in self.children:
            child.kill()  # does nothing to a process that has ended

    # The file

    def _is_first(self, error: BaseException) -> bool:
        """Writes the error to FAILURE_FILE, unless another rank has written one before."""
        if self.first_to_fail:
            return True
        if self.earlier is not None and self._written() == self.earlier:
            self.file.unlink(missing_ok=True)
        state = getattr(error, "state", OUT_OF_MEMORY if is_out_of_memory(error) else "failed")
        line = str(error).partition("\n")[0] or type(error).__name__
        with suppress(OSError), open(self.file, "x", encoding="utf-8") as file:
            json.dump({"rank": self.rank, "line": line, "state": state, "process": os.getpid()}, file)
            self.first_to_fail = True
        return self.first_to_fail

    def _written(self) -> dict[str, Any] | None:
        try:
            return json.loads(self.file.read_text(encoding="utf-8"))
        except (OSError, ValueError):  # there is none, or it is being written
            return None


class Launcher(_SubprocessScriptLauncher):
    """Starts ranks as Lightning does. In place of Lightning's observer, which kills all ranks without a message,
    `ranks` watches over them."""

    def __init__(self, ranks: Ranks, *arguments: Any):
        super().__init__(*arguments)
        self.ranks = ranks

    def launch(self, function: Callable, *arguments: Any, trainer: Trainer | None = None, **settings: Any) -> Any:
        # After this, Lightning's `launch` starts no processes: `_call_children_scripts` has set LOCAL_RANK.
        if not self.cluster_environment.creates_processes_externally:
            self.ranks.prepare()
            self._call_children_scripts()
        self.ranks.start(self.procs)
        return super().launch(function, *arguments, trainer=trainer, **settings)


def is_of_communication(error: BaseException) -> bool:
    """Whether gloo, NCCL or the store of the ranks' addresses has raised the error: another rank may be its cause."""
    gloo = isinstance(error, RuntimeError) and "/gloo/" in str(error)
    return gloo or isinstance(error, dist.DistError | ConnectionError)

"""SIGTERM, SIGUSR1 and Ctrl-C: finish the step, save, end cleanly.

The handler only takes a note; checkpoints.py reads it at the next safe point (after an optimizer step, or between two
validation batches), saves, and raises `Interrupted`, which fit() turns into a result. Nothing here calls sys.exit,
which would end a whole Hydra sweep. A second Ctrl-C means now.

Two subtleties. Signals of a terminal or a cluster reach the data workers too, and a dead worker would break the step
that is to be finished. For Ctrl-C and SIGUSR1 the workers inherit a handler that lets them live, set before they are
forked; SIGTERM they must ignore in their `worker_init_fn`, since PyTorch gives every worker a handler that exits.
And Lightning sets its own SIGTERM handler, which ends a run in the middle of an accumulation: ours replaces it later.
(Under SLURM its handler of SIGUSR1 would save in the middle of a step, into hpc_ckpt_1.ckpt: slurm.py turns it off.)
"""

import os
import signal
import threading
from types import FrameType
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

SIGNALS = signal.SIGINT, signal.SIGTERM, signal.SIGUSR1
"""Each one ends a run after its step, saved. SIGUSR1 is what `sbatch --signal=USR1@120` sends before the time is up."""


class Interrupted(Exception):
    """Training stopped on request, after saving."""


class Interrupt(Callback):
    """Knows whether somebody asked to stop. As a context, around trainer.fit, it borrows the signals."""

    def __init__(self) -> None:
        self.received: str | None = None
        self.training = False  # otherwise there is nothing to finish, and Ctrl-C is Python's own
        self.process = os.getpid()
        self.borrowed: dict[int, Any] = {}

    def requested(self, trainer: Trainer) -> bool:
        """Whether any rank was asked; with several ranks a small collective, so that all stop at the same step."""
        asked = self.received is not None
        return trainer.strategy.reduce_boolean_decision(asked, all=False) if trainer.world_size > 1 else asked

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self.process:
            return  # a data worker: its parent will end it
        if not self.training or (self.received is not None and number == signal.SIGINT):
            raise KeyboardInterrupt
        if self.received is None:
            self.received = signal.Signals(number).name
            # Not logging: a handler may run in the middle of a log call.
            os.write(2, f"\n{self.received}: finishing this step, then saving. Ctrl-C aborts at once.\n".encode())

    def __enter__(self) -> "Interrupt":
        if threading.current_thread() is threading.main_thread():  # Python allows it nowhere else
            self.borrowed = {number: signal.getsignal(number) for number in SIGNALS}
            signal.signal(signal.SIGINT, self._handle)
            signal.signal(signal.SIGUSR1, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.borrowed.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self.borrowed = {}

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        self.training = True
        if self.borrowed:
            signal.signal(signal.SIGTERM, self._handle)

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        self.training = False

    def on_exception(self, trainer: Trainer, module: LightningModule, exception: BaseException) -> None:
        self.training = False

"""SIGTERM, SIGUSR1, SIGUSR2 and Ctrl-C: the run finishes its step, saves a checkpoint and ends.

The signal handler only stores the signal. checkpoints.py reads it at the next safe point (after an optimizer step, or
between two validation batches), saves, and raises `Interrupted`, which fit() turns into a result. Nothing here calls
sys.exit, which would end a whole Hydra sweep. A second Ctrl-C aborts at once.

Signals of a terminal or a cluster also reach the data workers, and the step cannot be finished without them. The
workers inherit the handlers of all but SIGTERM, which are set before they are forked and do nothing in a worker.
PyTorch gives every worker a SIGTERM handler that exits, so they ignore SIGTERM in their `worker_init_fn`.

Lightning sets a SIGTERM handler that ends a run in the middle of an accumulation; the handler here replaces it. Its
SIGUSR1 handler under SLURM would save in the middle of a step; slurm.py turns that one off.

submitit has a handler of SIGUSR2 (or SIGUSR1) that requeues the job and exits. The handler here takes its place until
the run is saved; `hand_on` then calls it.
"""

import os
import signal
import threading
from types import FrameType
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_only

from model.training.signals import PREEMPTION, SIGNALS, remember


class Interrupted(Exception):
    """Training stopped on request, after a checkpoint was saved."""


class Interrupt(Callback):
    """Holds the request to stop. As a context manager around trainer.fit it handles the signals."""

    def __init__(self) -> None:
        self.received: str | None = None
        self.training = False  # otherwise there is no step to finish, and Ctrl-C raises KeyboardInterrupt
        self.process = os.getpid()
        self.borrowed: dict[int, Any] = {}

    def requested(self, module: LightningModule) -> bool:
        """Whether any rank received a signal. All ranks call it together, and so stop at the same step."""
        return module.over_hosts(self.received is not None) > 0

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self.process:
            return  # a data worker, which its parent ends
        remember(number)
        if not self.training or (self.received is not None and number == signal.SIGINT):
            raise KeyboardInterrupt
        if self.received is None:
            self.received = signal.Signals(number).name
            if rank_zero_only.rank == 0:
                # No logging: the handler may run in the middle of a log call.
                os.write(2, f"\n{self.received}: finishing this step, then saving. Ctrl-C aborts at once.\n".encode())

    def __enter__(self) -> "Interrupt":
        if threading.current_thread() is threading.main_thread():  # the only one in which Python sets handlers
            self.borrowed = {number: signal.getsignal(number) for number in SIGNALS}
            for number in (signal.SIGINT, *PREEMPTION):
                signal.signal(number, self._handle)
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

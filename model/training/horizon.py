"""When a run ends: after so many optimizer steps, or so many measured seconds of training, whichever comes first.

Runs of equal time are how patterns of different speed are compared fairly. The clock is efficiency.py's: it stands
still in the first steps of a session (compilation), in validations and while saving, and goes on from a checkpoint. A
schedule of the learning rate must then end with the seconds, so it follows the share of the run that is done and not
the number of the step; it reads that share as of the end of the step before.
"""

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from model.training.efficiency import Efficiency

FOREVER = 1 << 40
"""Lightning's max_steps where seconds alone end a run: one endless epoch, as with any other number."""

NEAR = 0.9
"""From this share of the seconds on the device is waited for at every step: a GPU is given work ahead, and a clock that
did not wait would notice the end too late."""


class Horizon(Callback):
    """Knows how far the run has come. Without seconds it reads no clock.

    max_steps: optimizer steps, or None. max_seconds: of training, all sessions together, or None.
    """

    def __init__(self, max_steps: int | None, max_seconds: float | None, efficiency: Efficiency):
        assert max_steps or max_seconds
        self.max_steps, self.max_seconds = max_steps, max_seconds
        self.efficiency = efficiency
        self.progress = 0.0  # share of the run that is done; at least 1 where it is over
        self.seconds = 0.0

    @property
    def over(self) -> bool:
        return self.progress >= 1

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        self._look(trainer, module)
        if self.over:  # resumed after its last step: seconds are up, of which Lightning knows nothing
            trainer.should_stop = True

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, *_: Any) -> None:
        if module.stepped:
            self._look(trainer, module)

    def _look(self, trainer: Trainer, module: LightningModule) -> None:
        shares = [trainer.global_step / self.max_steps] if self.max_steps else []
        if self.max_seconds:
            if module.device.type == "cuda" and self.seconds > NEAR * self.max_seconds:
                torch.cuda.synchronize(module.device)
            self.seconds = self.efficiency.elapsed()
            if trainer.world_size > 1:  # all ranks stop at the same step, and have the same learning rate
                seconds = torch.tensor(self.seconds, device=module.device)
                self.seconds = trainer.strategy.reduce(seconds, reduce_op="sum").item() / trainer.world_size
            shares.append(self.seconds / self.max_seconds)
        self.progress = max(shares)

    def describe(self, step: int) -> str:
        """For the log: "12/420", or "12 (30/120 s)"."""
        of_steps = f"{step}/{self.max_steps}" if self.max_steps else str(step)
        return f"{of_steps} ({self.seconds:.0f}/{self.max_seconds:g} s)" if self.max_seconds else of_steps

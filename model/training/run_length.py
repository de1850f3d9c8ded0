"""The length of a run: a number of optimizer steps, or of measured seconds of training, whichever is reached first.

Patterns of different speed are compared fairly in runs of equal time. The clock (efficiency.py) stands still during the
first steps of a session and the first step of a phase (compilation), validations and saves, and continues from a
checkpoint. Where seconds limit the run, the learning-rate schedule follows the fraction of the run that is done at the
end of the previous step, and not the step number.
"""

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from model.training.efficiency import Efficiency

FOREVER = 1 << 40
"""Lightning's max_steps where seconds alone limit a run. Training is one endless epoch in any case."""

NEAR = 0.9
"""Fraction of max_seconds after which each step waits for the device. A GPU runs behind the host, so a clock that does
not wait would notice the end too late."""


class RunLength(Callback):
    """Measures which fraction of the run is done.

    Args:
        max_steps: optimizer steps of the whole run, or None.
        max_seconds: seconds of training over all sessions, or None; the clock is then not read.
        efficiency: measures the seconds.
    """

    def __init__(self, max_steps: int | None, max_seconds: float | None, efficiency: Efficiency):
        assert max_steps or max_seconds
        self.max_steps, self.max_seconds = max_steps, max_seconds
        self.efficiency = efficiency
        self.progress = 0.0  # fraction of the run that is done; at least 1 at its end
        self.seconds = 0.0

    @property
    def over(self) -> bool:
        """Whether the run has reached its length."""
        return self.progress >= 1

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        self._update(trainer, module)
        if self.over:  # resumed after its last second, a limit that Lightning does not have
            trainer.should_stop = True

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, *_: Any) -> None:
        if module.stepped:
            self._update(trainer, module)

    def _update(self, trainer: Trainer, module: LightningModule) -> None:
        fractions = [trainer.global_step / self.max_steps] if self.max_steps else []
        if self.max_seconds:
            if module.device.type == "cuda" and self.seconds > NEAR * self.max_seconds:
                torch.cuda.synchronize(module.device)
            self.seconds = self.efficiency.elapsed()
            # The mean, so that all ranks stop at the same step with the same learning rate.
            self.seconds = module.over_hosts(self.seconds) / trainer.world_size
            fractions.append(self.seconds / self.max_seconds)
        self.progress = max(fractions)

    def describe(self, step: int) -> str:
        """Returns the step as the log shows it: "12/420", or "12 (30/120 s)"."""
        of_steps = f"{step}/{self.max_steps}" if self.max_steps else str(step)
        return f"{of_steps} ({self.seconds:.0f}/{self.max_seconds:g} s)" if self.max_seconds else of_steps

"""A job of submitit that is preempted once, in its third step."""

from pathlib import Path
from typing import Any

import submitit
import torch

from model.training.signals import hand_on
from tests.model.parallel import training
from tests.model.parallel.faults import Fault


class Job:
    """Trains a run, or resumes it, as a sweep's job does."""

    def __init__(self, path: Path, **settings: Any) -> None:
        self.path, self.settings = path, settings

    def __call__(self) -> int:
        torch.set_num_threads(1)
        resume = (self.path / "checkpoints/last.ckpt").exists()
        preemption = [] if resume else [Fault("SIGUSR2", 0, 2)]
        training.train(self.path, resume=resume, callbacks=preemption, **self.settings)
        hand_on()
        return 1 + resume

    def checkpoint(self) -> submitit.helpers.DelayedSubmission:
        return submitit.helpers.DelayedSubmission(self)

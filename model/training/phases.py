"""The phases of a run: parts in which sequences are shorter, or windows narrower, than in the last one.

Every optimizer step has the same number of tokens: batches have more sequences where these are shorter. Shapes and
patterns are constant within a phase. Validations use the patterns of the last phase, and the data module gives them
sequences of its length.
"""

import logging
from bisect import bisect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from model.config import AttentionPlan
from model.training.efficiency import Efficiency

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Phase:
    """A part of a run.

    step: its first optimizer step, counted from 0.
    sequence_length: tokens in a training sequence.
    plan: its patterns; only numbers that no parameter depends on differ between phases.
    settings: what it sets, for the log.
    """

    step: int
    sequence_length: int
    plan: AttentionPlan
    settings: str


class Phases(Callback):
    """Gives the model the patterns of each phase, and logs its beginning. The first step of a phase is left out of all
    speeds, since layers may be compiled in it."""

    def __init__(self, phases: Sequence[Phase], efficiency: Efficiency):
        self.phases, self.efficiency = phases, efficiency
        self.steps = [phase.step for phase in phases]
        self.number: int | None = None  # of the phase of the latest step in this session
        self.holds = False

    def ends_at(self, step: int) -> bool:
        """Whether `step`, counted from 1, is the last one of a phase that another one follows."""
        return step in self.steps[1:]

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, *_: Any) -> None:
        number = bisect(self.steps, trainer.global_step) - 1
        phase = self.phases[number]
        if module.model.plan is not phase.plan:
            module.model.set_plan(phase.plan)
        if number == self.number:
            return
        self.number = number
        module.bytes_sent = None  # to be counted anew
        log.info("phase %d of %d, from step %d: %s", number + 1, len(self.phases), phase.step, phase.settings)
        if trainer.global_step == phase.step and number and not self.efficiency.held:
            self.efficiency.hold(module)
            self.holds = True

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, *_: Any) -> None:
        if not module.stepped:
            return
        if self.holds:
            self.efficiency.release()
            self.holds = False
        if self.ends_at(trainer.global_step):
            self.efficiency.end_phase()

    def on_validation_start(self, trainer: Trainer, module: LightningModule) -> None:
        self._set_last(module)

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        self._set_last(module)

    def _set_last(self, module: LightningModule) -> None:
        if module.model.plan is not self.phases[-1].plan:
            module.model.set_plan(self.phases[-1].plan)

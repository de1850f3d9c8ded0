"""Checks that the loss and gradient of each training step are finite, and that its layouts were complete."""

import logging
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from model.training.failures import ON_NAN, OVERFLOW, DivergedError, LayoutOverflowError, diverged_message

log = logging.getLogger(__name__)


class StepChecks:
    """Checks each training step, and counts the steps that are skipped.

    What `watch` and `overflowed` find stays on the device, and `check` reads it where something is logged, validated or
    saved: to read it at every step would make the host wait for the device every time.

    Args:
        on_nan, max_skipped_steps: as in fit().
        checkpoint: the file of the last checkpoint, which may not exist yet.
    """

    def __init__(self, on_nan: str = ON_NAN[0], max_skipped_steps: int = 0, checkpoint: Path | None = None) -> None:
        self.can_skip, self.max_skipped_steps, self.checkpoint = on_nan == "skip_step", max_skipped_steps, checkpoint
        self.skipped_steps = 0  # over all sessions
        self.step = 0  # the current one, counted from 1
        self._samples: dict[int, tuple[int, int]] = {}  # step -> which samples it takes, of steps not checked yet

    def start(self, device: torch.device, document_names: Callable[[int, int], list[str]] | None) -> None:
        """Begins a session. document_names: maps a range of training samples to the names of their documents."""
        # Plain tensors and not buffers: Lightning's bf16-true precision would cast those of floats.
        self.diverged_at = torch.full((), -1, dtype=torch.int64, device=device)
        self.overflowed = torch.zeros((), dtype=torch.bool, device=device)
        """Whether a layout of this session was incomplete."""
        self._document_names = document_names

    def begin_batch(self, step: int, first: int, last: int) -> None:
        """Begins a batch of `step`, of the training samples `first` <= n < `last`. A step may have several batches."""
        self.step = step
        self._samples[step] = (self._samples.get(step, (first,))[0], last)

    def watch(self, value: Tensor) -> None:
        """Records the current step if `value`, its loss or the norm of its gradient, is not finite."""
        if self.can_skip:  # such a step is skipped before the update
            return
        first_time = (self.diverged_at < 0) & ~value.detach().isfinite()
        self.diverged_at = torch.where(first_time, self.step, self.diverged_at)

    def skip(self) -> None:
        """Counts the current step as skipped. Raises DivergedError if it is one more than `max_skipped_steps`."""
        self.skipped_steps += 1
        if self.skipped_steps > self.max_skipped_steps:
            raise DivergedError(self._diverged(self.step))
        log.warning(
            "step %d skipped (%d of at most %d): its loss or gradient is not finite; its batch holds %s",
            *(self.step, self.skipped_steps, self.max_skipped_steps, ", ".join(self._documents(self.step)) or "?"),
        )

    def check(self) -> None:
        """Raises DivergedError if a loss or gradient since the start was not finite, naming the first such step, and
        LayoutOverflowError if a layout was incomplete."""
        if self.overflowed:
            raise LayoutOverflowError(OVERFLOW)
        step = int(self.diverged_at)
        if step >= 0:
            raise DivergedError(self._diverged(step))
        self._samples = {last: self._samples[last] for last in list(self._samples)[-1:]}

    def _diverged(self, step: int) -> str:
        saved = self.checkpoint if self.checkpoint and self.checkpoint.exists() else None
        return diverged_message(step, self._documents(step), saved, self.skipped_steps)

    def _documents(self, step: int) -> list[str]:
        """Returns the names of the documents of a recent step; none if the data module has no names."""
        return self._document_names(*self._samples[step]) if self._document_names and step in self._samples else []

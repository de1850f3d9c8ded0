"""The console: a progress bar in a terminal, plain lines elsewhere (a log file, a cluster's output, a CI job).

Lightning's bars count the batches of an epoch. Here the data are endless, and the run length gives the remaining time.
"""

import logging
import time
from collections.abc import Mapping

from lightning.pytorch import Callback, LightningModule, Trainer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from model.training.run_length import RunLength

log = logging.getLogger(__name__)

SHOWN = {
    "train/loss": "loss {:.3f} {loss}",
    "train/bits_per_byte": "{:.3f} {bits_per_byte}",
    "tokens_per_second": "{:,.0f} tokens/s",
    "validation/loss": "validation loss {:.3f} {loss}",
    "validation/bits_per_byte": "{:.3f} {bits_per_byte}",
}
"""Column of metrics.csv -> format of its value on the console. {loss} and {bits_per_byte} stand for their units."""


class Progress(Callback):
    """Shows the values that metrics.Recorder logs.

    units: those of losses, as data.DataModule has them.
    """

    def __init__(self, run_length: RunLength, units: Mapping[str, str], console: Console | None = None):
        self.run_length = run_length
        self.units = {name: unit.replace(" per ", "/") for name, unit in units.items()}
        self.console = console or Console(stderr=True)
        self.bar: Bar | None = None
        self.active = False

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        self.active = trainer.is_global_zero
        self.progress_before, self.started = self.run_length.progress, time.perf_counter()
        if self.active and self.console.is_terminal:
            self.bar = Bar(
                TextColumn("step" if self.run_length.max_steps else "second"),
                MofNCompleteColumn(),
                BarColumn(),
                TextColumn("{task.description}"),
                TimeElapsedColumn(),
                TextColumn("ETA"),
                TimeRemainingColumn(),
                console=self.console,
            )
            total = self.run_length.max_steps or round(self.run_length.max_seconds)
            self.task = self.bar.add_task("", total=total, completed=self._completed(trainer))
            self.bar.start()

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, *_: object) -> None:
        if self.bar is not None:
            self.bar.update(self.task, completed=self._completed(trainer))

    def _completed(self, trainer: Trainer) -> int:
        return trainer.global_step if self.run_length.max_steps else round(self.run_length.seconds)

    def show(self, step: int, values: dict[str, float]) -> None:
        """Shows the values of one logged event as the bar's text, or as a line."""
        if not self.active:
            return
        text = "  ".join(form.format(values[key], **self.units) for key, form in SHOWN.items() if key in values)
        if self.bar is None or "validation/loss" in values:
            log.info("step %s  %s  ETA %s", self.run_length.describe(step), text, self._eta())
        else:
            self.bar.update(self.task, description=text)

    def _eta(self) -> str:
        done, left = self.run_length.progress - self.progress_before, max(0.0, 1 - self.run_length.progress)
        if done <= 0:
            return "-"
        seconds = round((time.perf_counter() - self.started) / done * left)
        return f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}"

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        self._close()

    def on_exception(self, trainer: Trainer, module: LightningModule, exception: BaseException) -> None:
        self._close()

    def _close(self) -> None:
        if self.bar is not None:
            self.bar.stop()
            self.bar = None

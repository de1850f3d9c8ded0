"""The console: a bar in a terminal, plain lines elsewhere (a log file, a cluster's output, a CI job).

Lightning's bars count batches of an epoch; our data never end, so only the optimizer steps give an ETA.
"""

import logging
import time

from lightning.pytorch import Callback, LightningModule, Trainer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

log = logging.getLogger(__name__)

SHOWN = {
    "train/loss": "loss {:.3f}",
    "train/bits_per_byte": "{:.3f} bits/byte",
    "tokens_per_second": "{:,.0f} tokens/s",
    "validation/loss": "validation loss {:.3f}",
    "validation/bits_per_byte": "{:.3f} bits/byte",
}


class Progress(Callback):
    """Shows what metrics.Recorder logs."""

    def __init__(self, console: Console | None = None):
        self.console = console or Console(stderr=True)
        self.bar: Bar | None = None
        self.active = False

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        self.active = trainer.is_global_zero
        self.first_step, self.max_steps, self.started = trainer.global_step, trainer.max_steps, time.perf_counter()
        if self.active and self.console.is_terminal:
            self.bar = Bar(
                TextColumn("step"),
                MofNCompleteColumn(),
                BarColumn(),
                TextColumn("{task.description}"),
                TimeElapsedColumn(),
                TextColumn("ETA"),
                TimeRemainingColumn(),
                console=self.console,
            )
            self.task = self.bar.add_task("", total=self.max_steps, completed=trainer.global_step)
            self.bar.start()

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, *_: object) -> None:
        if self.bar is not None:
            self.bar.update(self.task, completed=trainer.global_step)

    def show(self, step: int, values: dict[str, float]) -> None:
        """One logged event: the bar's text, or one line."""
        if not self.active:
            return
        text = "  ".join(form.format(values[key]) for key, form in SHOWN.items() if key in values)
        if self.bar is None or "validation/loss" in values:
            log.info("step %d/%d  %s  ETA %s", step, self.max_steps, text, self._eta(step))
        else:
            self.bar.update(self.task, description=text)

    def _eta(self, step: int) -> str:
        done = step - self.first_step
        if done <= 0:
            return "-"
        seconds = round((time.perf_counter() - self.started) / done * (self.max_steps - step))
        return f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}"

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        self._close()

    def on_exception(self, trainer: Trainer, module: LightningModule, exception: BaseException) -> None:
        self._close()

    def _close(self) -> None:
        if self.bar is not None:
            self.bar.stop()
            self.bar = None

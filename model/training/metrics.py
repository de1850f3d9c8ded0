"""metrics.csv, and the callback that logs.

Lightning's CSVLogger starts a new version folder on resume, deletes a metrics.csv that it finds, and orders columns by
hash. MetricsCSV keeps one file. Each logged event is one row: `step`, then a column for each metric in the order of
first appearance. Each checkpoint stores the number of rows, and a resumed run drops the rows after them. So a stopped
and resumed run leaves the same file as one that never stopped.
"""

import contextlib
import csv
import io
import os
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only

from model.training.efficiency import Efficiency
from model.training.phases import Phases
from model.training.progress import Progress
from model.training.run_length import RunLength
from model.training.storage import naming, write_atomically


class MetricsCSV(Logger):
    """Writes every logged number to one CSV file."""

    def __init__(self, path: Path):
        super().__init__()
        self.path = path
        self.columns = ["step"]
        self.rows = 0  # in the file
        if path.exists():
            self.columns, rows = read_rows(path)
            self.rows = len(rows)

    name = "metrics"
    version = ""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        row = {"step": step, **metrics}
        new = [key for key in row if key not in self.columns]
        if new or not self.path.exists():  # a new column, two or three times in a run
            rows = read_rows(self.path)[1] if self.path.exists() else []
            self.columns += new
            self._rewrite([*rows, row])
            return
        line = io.StringIO()
        csv.DictWriter(line, self.columns, lineterminator="\n").writerow(row)
        content, size = line.getvalue().encode(), self.path.stat().st_size
        with naming(self.path, len(content)):
            try:
                with open(self.path, "ab") as file:
                    file.write(content)
            except OSError:
                with contextlib.suppress(OSError):
                    os.truncate(self.path, size)  # removes a row that was written in part
                raise
        self.rows += 1

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Does nothing: config.yaml holds the hyperparameters."""

    @rank_zero_only
    def keep(self, rows: int) -> None:
        """Drops all rows after the first `rows`."""
        if self.rows > rows:
            self._rewrite(read_rows(self.path)[1][:rows])

    def _rewrite(self, rows: list[dict[str, Any]]) -> None:
        text = io.StringIO()
        writer = csv.DictWriter(text, self.columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_atomically(self.path, text.getvalue())
        self.rows = len(rows)


def read_rows(path: Path) -> tuple[list[str], list[dict[str, str]]]:
    """Returns the columns and rows of a metrics.csv. A value that was not logged is ''."""
    with open(path, encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        rows = list(reader)
    return list(reader.fieldnames or ["step"]), rows


class Recorder(Callback):
    """Logs to all loggers and the console every `log_every` optimizer steps, at the end of each phase and of the run,
    and after each validation.

    It calls the loggers itself. Lightning writes values of `self.log` after the callbacks of a step, so a checkpoint
    saved in a callback would lack the row of its step.
    """

    def __init__(
        self,
        log_every: int,
        metrics: MetricsCSV,
        efficiency: Efficiency,
        run_length: RunLength,
        progress: Progress,
        phases: Phases | None = None,
    ):
        self.log_every = log_every
        self.metrics = metrics
        self.efficiency = efficiency
        self.run_length = run_length
        self.progress = progress
        self.phases = phases

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, *_: Any) -> None:
        step = trainer.global_step
        at_end = self.run_length.over or (self.phases is not None and self.phases.ends_at(step))
        if module.stepped and (step % self.log_every == 0 or at_end):
            values = module.train_metrics()
            values |= self.efficiency.measure(module)
            self._log(trainer, step, values)

    def on_validation_end(self, trainer: Trainer, module: LightningModule) -> None:
        if trainer.state.fn == "fit":
            self._log(trainer, trainer.global_step, module.validation_metrics)

    def _log(self, trainer: Trainer, step: int, values: dict[str, float]) -> None:
        for logger in trainer.loggers:
            logger.log_metrics(values, step=step)
        self.progress.show(step, values)

    def state_dict(self) -> dict[str, Any]:
        return {"rows": self.metrics.rows}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.metrics.keep(state_dict["rows"])

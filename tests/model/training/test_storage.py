"""Full disks, read-only file systems and plain files in a folder's place.

A partial file that is a link to /dev/full meets a real ENOSPC; a limit of the file size (EFBIG) stops a write midway.
"""

import errno
import json
import logging
import os
import resource
from contextlib import contextmanager
from pathlib import Path

import lightning
import numpy as np
import pytest
import torch
from stand_ins import train

from model.evaluation import LossStore
from model.training.checkpoints import AtomicCheckpointIO, go_back_to, read_checkpoint
from model.training.metrics import MetricsCSV, read_rows
from model.training.run_folder import RunFolder
from model.training.storage import StorageError, make_folder, naming, write_atomically, write_json

needs_dev_full = pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")


@contextmanager
def largest_file(size: int):
    """No file of this process may grow beyond `size` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def fill(file: Path) -> None:
    """Every byte written to `file` meets a full disk."""
    file.symlink_to("/dev/full")


def partial_of(file: Path) -> Path:
    return file.with_name(f"{file.name}.{os.getpid()}.partial")


def partials(folder: Path) -> list[Path]:
    return [file for file in folder.rglob("*") if "partial" in file.name]


@needs_dev_full
def test_a_full_disk_keeps_the_old_checkpoint_and_names_the_space(tmp_path):
    """torch.save hides the system's error behind a RuntimeError of its own."""
    path = tmp_path / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint({"state_dict": {}, "step": 7}, path)
    fill(tmp_path / "last.ckpt.partial")
    with pytest.raises(StorageError) as error:
        AtomicCheckpointIO().save_checkpoint({"state_dict": {"x": torch.ones(100_000)}, "step": 8}, path)
    line = str(error.value)
    assert error.value.errno == errno.ENOSPC and line.startswith(f"{path}: ") and "\n" not in line
    assert "400,000 bytes needed" in line and "bytes free" in line
    assert not partials(tmp_path) and read_checkpoint(path)["step"] == 7


def test_a_write_that_ends_midway_leaves_no_partial_file(tmp_path):
    last, best = tmp_path / "last.ckpt", tmp_path / "best.ckpt"
    weights = {"x": torch.ones(100_000)}
    AtomicCheckpointIO().save_checkpoint({"state_dict": {}, "step": 7}, last)
    AtomicCheckpointIO().save_checkpoint({"state_dict": weights, "step": 6}, best)
    writes = {
        last: lambda: AtomicCheckpointIO().save_checkpoint({"state_dict": weights}, last),
        tmp_path / "losses" / "a.npy": lambda: LossStore(tmp_path / "losses").save("a", np.ones(100_000)),
        tmp_path / "a.json": lambda: write_json(tmp_path / "a.json", ["x" * 100_000]),
    }
    for file, write in writes.items():
        with largest_file(50_000), pytest.raises(StorageError) as error:
            write()
        assert (error.value.errno, error.value.filename) == (errno.EFBIG, str(file))
    with largest_file(50_000), pytest.raises(StorageError, match=r"last\.ckpt"):
        go_back_to(best, last)
    assert not partials(tmp_path) and read_checkpoint(last)["step"] == 7


@pytest.mark.parametrize("place", ["file", "file/below"])
def test_a_plain_file_in_a_folders_place(tmp_path, place):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=str(tmp_path / place)):
        make_folder(tmp_path / place)
    with pytest.raises(StorageError, match=str(tmp_path / place)):
        RunFolder.create(tmp_path / place, {})


def test_a_read_only_file_system_is_named_with_the_file(tmp_path, monkeypatch):
    def refuse(path, *_, **__):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    monkeypatch.setattr("builtins.open", refuse)
    with pytest.raises(StorageError) as error:
        write_atomically(tmp_path / "a.json", "{}")
    monkeypatch.undo()
    assert str(error.value) == f"{tmp_path / 'a.json'}: cannot be written: {os.strerror(errno.EROFS)}"


def test_an_error_that_is_not_the_file_systems_stays_as_it_is(tmp_path):
    with pytest.raises(KeyError), naming(tmp_path):
        raise KeyError("x")
    with pytest.raises(ValueError, match="unrelated"), naming(tmp_path):
        try:
            raise OSError(errno.ENOSPC, "No space left on device")
        except OSError:
            raise ValueError("unrelated") from None


def test_no_half_of_a_metrics_row(tmp_path):
    metrics = MetricsCSV(tmp_path / "metrics.csv")
    metrics.log_metrics({"loss": 1.0}, 1)
    size = metrics.path.stat().st_size
    with largest_file(size + 5), pytest.raises(StorageError, match=r"metrics\.csv"):
        metrics.log_metrics({"loss": 0.123456789}, 2)
    assert metrics.path.stat().st_size == size
    metrics.log_metrics({"loss": 0.5}, 2)
    assert [row["step"] for row in read_rows(metrics.path)[1]] == ["1", "2"]


def test_a_log_that_cannot_grow_costs_a_line_a_record(tmp_path, capsys):
    folder = RunFolder.create(tmp_path / "run", {})
    with folder.logging_to_file():
        logging.getLogger("probe").info("first")
        with largest_file(folder.log_file.stat().st_size):
            logging.getLogger("probe").info("second")
        logging.getLogger("probe").info("third")
    error = capsys.readouterr().err
    assert str(folder.log_file) in error and "Traceback" not in error and error.count("\n") == 1
    assert "first" in folder.log_file.read_text() and "third" in folder.log_file.read_text()


class FullAt(lightning.Callback):
    """The disk is full for these files from one step on."""

    def __init__(self, step: int, *files: Path):
        self.step, self.files = step, files

    def on_train_batch_end(self, trainer, *_) -> None:
        if trainer.global_step == self.step:
            for file in self.files:
                fill(file)


@needs_dev_full
@pytest.mark.parametrize("summary_too", [False, True])
def test_a_run_that_meets_a_full_disk_has_failed_and_can_be_resumed(tmp_path, summary_too):
    last, summary = tmp_path / "checkpoints/last.ckpt", tmp_path / "summary.json"
    files = [last.with_name("last.ckpt.partial"), *([partial_of(summary)] if summary_too else [])]
    with pytest.raises(StorageError) as error:
        train(tmp_path, max_steps=12, validate_every=4, callbacks=[FullAt(5, *files)])
    assert error.value.filename == str(last)  # and not summary.json, which fails later
    assert read_checkpoint(last)["global_step"] == 4 and not partials(tmp_path)
    assert json.loads(summary.read_text())["state"] == "failed"
    assert train(tmp_path, max_steps=12, validate_every=4, resume=True).state == "finished"


@needs_dev_full
def test_an_end_that_cannot_be_written_is_an_error(tmp_path):
    summary = tmp_path / "summary.json"
    with pytest.raises(StorageError, match=str(summary)):
        train(tmp_path, max_steps=4, callbacks=[FullAt(3, partial_of(summary))])
    assert json.loads(summary.read_text())["state"] == "failed"

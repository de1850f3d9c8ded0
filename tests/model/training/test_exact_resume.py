"""A run that was stopped and resumed ends exactly as one that never stopped: weights, optimizer, every logged loss."""

import csv
import json
import os
import signal
import time
from pathlib import Path

import lightning
import pytest
import stand_ins
import torch
from stand_ins import train

from model.training import optimizer as optimizers
from model.training.checkpoints import CheckpointError
from tests.commands import ROOT, started

EXACT = (
    "step",
    "train/loss",
    "train/bits_per_byte",
    "train/perplexity",
    "train/learning_rate",
    "train/gradient_norm",
    "density_pairs",
    "validation/loss",
    "validation/bits_per_byte",
    "validation/loss_first_512",
)


class StopAfter(lightning.Callback):
    """Presses Ctrl-C in the first micro-batch of an optimizer step, so that the step must be finished first."""

    def __init__(self, step: int):
        self.step = step

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if trainer.global_step == self.step - 1 and batch_idx % trainer.accumulate_grad_batches == 0:
            signal.raise_signal(signal.SIGINT)


class StopInValidation(lightning.Callback):
    def __init__(self, step: int):
        self.step = step

    def on_validation_batch_start(self, trainer, module, batch, batch_idx):
        if trainer.global_step == self.step and batch_idx == 1:
            signal.raise_signal(signal.SIGTERM)


def train_in_sessions(path, stops, **settings):
    """Sessions that end at each of `stops`, and a last one to the end; each starts from other random weights."""
    for number, stop in enumerate(stops):
        callback = stop if isinstance(stop, lightning.Callback) else StopAfter(stop)
        result = train(path, resume=number > 0, seed=number, callbacks=[callback], **settings)
        assert result.state == "interrupted"
        if not isinstance(stop, lightning.Callback):
            assert result.step == stop
    result = train(path, resume=bool(stops), seed=len(stops), **settings)
    assert result.state == "finished"
    return result


def logged(path):
    with open(path / "metrics.csv", newline="") as file:
        return [{key: row.get(key, "") for key in EXACT} for row in csv.DictReader(file)]


def costs(path):
    summary = json.loads((path / "summary.json").read_text())
    return {key: summary[key] for key in ("density_pairs", "density_tiles", "attention_flops_per_token")}


def assert_same_end(one: Path, other: Path):
    assert logged(one) == logged(other)
    assert costs(one) == costs(other)
    a, b = (torch.load(path / "checkpoints" / "last.ckpt", weights_only=True) for path in (one, other))
    for part in ("state_dict", "optimizer_states", "lr_schedulers", "TinyData", "global_step"):
        assert_equal(a[part], b[part], part)
    for key, value in a["loops"]["fit_loop"].items():
        if "val_loop" not in key:  # where Lightning keeps no lasting count
            assert_equal(value, b["loops"]["fit_loop"][key], key)
    own = next(key for key in a["callbacks"] if "Checkpoints" in key)
    assert_equal(a["callbacks"][own], b["callbacks"][own], own)
    assert (one / "checkpoints" / "best.ckpt").exists() == (other / "checkpoints" / "best.ckpt").exists()


def assert_equal(a, b, where):
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_equal(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for index, pair in enumerate(zip(a, b, strict=True)):
            assert_equal(*pair, f"{where}[{index}]")
    else:
        assert a == b, f"{where}: {a} != {b}"


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("stops", [[5], [4], [2, 9]], ids=["mid-way", "where a validation is due", "twice"])
def test_stopped_and_resumed(tmp_path, accumulate, workers, stops):
    settings = dict(accumulate=accumulate, workers=workers, max_steps=10)
    train(tmp_path / "straight", **settings)
    train_in_sessions(tmp_path / "stopped", stops, **settings)
    assert_same_end(tmp_path / "straight", tmp_path / "stopped")


@pytest.mark.parametrize(
    "stops",
    [
        [StopInValidation(4)],
        [StopInValidation(4), StopInValidation(8)],
        [3, StopInValidation(4), 5, 6, 8, 9],
    ],
)
def test_stopped_in_a_validation(tmp_path, stops):
    train(tmp_path / "straight", accumulate=3)
    train_in_sessions(tmp_path / "stopped", stops, accumulate=3)
    assert_same_end(tmp_path / "straight", tmp_path / "stopped")


def test_muon(tmp_path):
    muon = stand_ins.OPTIMIZER | dict(name="muon", momentum=0.95)
    train(tmp_path / "straight", optimizer=muon)
    train_in_sessions(tmp_path / "stopped", [5], optimizer=muon)
    assert_same_end(tmp_path / "straight", tmp_path / "stopped")


def test_frozen_parameters(tmp_path):
    frozen = stand_ins.OPTIMIZER | dict(freeze=["embed.*", "hidden.*", "!hidden.bias"])
    train(tmp_path / "straight", optimizer=frozen)
    train_in_sessions(tmp_path / "stopped", [5], optimizer=frozen)
    assert_same_end(tmp_path / "straight", tmp_path / "stopped")


def test_best_is_remembered(tmp_path):
    """The best validation comes before the stop, and later ones do not replace it."""
    settings = dict(validate_every=1, max_steps=7)
    train(tmp_path / "run", callbacks=[stand_ins.BestAt(3), StopAfter(5)], **settings)
    result = train(tmp_path / "run", resume=True, seed=1, callbacks=[stand_ins.BestAt(3)], **settings)
    assert torch.load(result.best, weights_only=True)["global_step"] == 3
    assert torch.load(result.last, weights_only=True)["global_step"] == 7


class Crash(lightning.Callback):
    def __init__(self, step: int):
        self.step = step

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == self.step:
            raise RuntimeError("power cut")


def test_going_back_to_the_best_checkpoint(tmp_path):
    """The last one is truncated. From then on the run is at the best one, also after a crash before the next save."""
    best = stand_ins.BestAt(4)
    for name in ("straight", "back"):
        train(tmp_path / name, callbacks=[best])
    last, best_file = (tmp_path / "back/checkpoints" / name for name in ("last.ckpt", "best.ckpt"))
    last.write_bytes(last.read_bytes()[:1000])
    with pytest.raises(RuntimeError, match="power cut"):
        train(tmp_path / "back", resume=best_file, seed=1, callbacks=[best, Crash(5)])
    assert [row["step"] for row in logged(tmp_path / "back")] == ["1", "2", "3", "4", "4", "5"]
    train(tmp_path / "back", resume=True, seed=2, callbacks=[best])
    assert_same_end(tmp_path / "straight", tmp_path / "back")


@pytest.mark.parametrize("validate_every", [None, 3])
@pytest.mark.parametrize("crash", [5, 6, 7])
def test_crash_goes_back_to_the_latest_save(tmp_path, validate_every, crash):
    """A crash leaves rows after the checkpoint; resuming drops them and logs them again."""

    settings = dict(validate_every=validate_every, save_every=2, max_steps=9)
    train(tmp_path / "straight", **settings)
    with pytest.raises(RuntimeError, match="power cut"):
        train(tmp_path / "stopped", callbacks=[Crash(crash)], **settings)
    assert len(logged(tmp_path / "stopped")) > 4
    train(tmp_path / "stopped", resume=True, seed=1, **settings)
    assert_same_end(tmp_path / "straight", tmp_path / "stopped")


def test_the_folder_may_move(tmp_path):
    train(tmp_path / "straight")
    train(tmp_path / "here", callbacks=[StopAfter(6)])
    (tmp_path / "here").rename(tmp_path / "there")
    train(tmp_path / "there", resume=True, seed=1)
    assert_same_end(tmp_path / "straight", tmp_path / "there")


def test_resuming_a_finished_run_changes_nothing_and_still_reports(tmp_path):
    first = train(tmp_path / "run", max_steps=6)
    rows, saved = logged(tmp_path / "run"), (tmp_path / "run/checkpoints/last.ckpt").read_bytes()
    again = train(tmp_path / "run", resume=True, seed=1, max_steps=6)
    assert (again.state, again.step, again.summary["validation_loss"]) == (
        "finished",
        6,
        first.summary["validation_loss"],
    )
    assert again.summary["tokens_per_second"] == first.summary["tokens_per_second"] > 0
    assert logged(tmp_path / "run") == rows
    assert (tmp_path / "run/checkpoints/last.ckpt").read_bytes() == saved


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_signal_from_outside(tmp_path, number):
    """As a cluster or a terminal sends it: to all processes, data workers included, while gradients accumulate."""
    steps = 25
    program = "tests/model/training/stand_ins.py", tmp_path / "stopped", str(steps)
    with started(*program, PYTHONPATH=str(ROOT)) as process:
        metrics, deadline = tmp_path / "stopped" / "metrics.csv", time.monotonic() + 60
        while not (metrics.exists() and len(logged(tmp_path / "stopped")) > 5):
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.02)
        os.killpg(process.pid, number)
        errors = process.stderr.read()
    assert process.returncode == 0 and "state interrupted" in errors, errors
    assert f"python train.py resume={tmp_path / 'stopped'}" in errors
    assert json.loads((tmp_path / "stopped" / "summary.json").read_text())["state"] == "interrupted"

    stand_ins.train(tmp_path / "stopped", resume=True, seed=1, max_steps=steps, accumulate=8, workers=2)
    stand_ins.train(tmp_path / "straight", max_steps=steps, accumulate=8)
    assert_same_end(tmp_path / "straight", tmp_path / "stopped")


def test_a_finished_run_can_be_extended(tmp_path):
    """On a schedule that does not depend on the end. (The straight run has no validation at step 6.)"""
    settings = dict(optimizer=stand_ins.OPTIMIZER | dict(schedule=dict(name="constant", warmup_fraction=0.0)))
    train(tmp_path / "straight", max_steps=12, **settings)
    train(tmp_path / "extended", max_steps=6, **settings)
    train(tmp_path / "extended", max_steps=12, resume=True, seed=1, **settings)
    rows = [row for row in logged(tmp_path / "extended") if not (row["step"] == "6" and row["validation/loss"])]
    assert rows == logged(tmp_path / "straight")


SCHEDULES = [
    dict(name="cosine", warmup_fraction=0.2, final_fraction=0.1),
    dict(name="warmup_stable_decay", warmup_fraction=0.1, decay_fraction=0.5, final_fraction=0.0),
    dict(name="constant", warmup_fraction=0.4),
]


@pytest.mark.parametrize("optimizer", [dict(name="adamw"), dict(name="muon", momentum=0.95)], ids=lambda o: o["name"])
@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda schedule: schedule["name"])
def test_an_extended_run_follows_the_new_schedule_from_its_first_step(tmp_path, optimizer, schedule):
    settings = dict(optimizer=stand_ins.OPTIMIZER | optimizer | dict(schedule=schedule), validate_every=None)
    train(tmp_path / "run", max_steps=4, **settings)
    train(tmp_path / "run", max_steps=12, resume=True, seed=1, **settings)
    factor, shares = optimizers.SCHEDULES[schedule["name"]], {k: v for k, v in schedule.items() if k != "name"}
    expected = [0.01 * factor(step, 4 if step < 4 else 12, **shares) for step in range(12)]
    rates = [float(row["train/learning_rate"]) for row in logged(tmp_path / "run")]
    assert rates == pytest.approx(expected, rel=1e-9)


def test_an_extended_run_follows_the_new_schedule_under_max_seconds(tmp_path):
    """The run ends by its steps, and the schedule follows the fraction of them that is done."""
    train(tmp_path / "run", max_steps=8, max_seconds=1000.0)
    train(tmp_path / "run", max_steps=32, max_seconds=1000.0, resume=True, seed=1)
    row = next(row for row in logged(tmp_path / "run") if row["step"] == "9")
    shares = {k: v for k, v in stand_ins.OPTIMIZER["schedule"].items() if k != "name"}
    expected = 0.01 * optimizers.cosine(
        optimizers.TIMED_SCHEDULE_STEPS * 8 // 32, optimizers.TIMED_SCHEDULE_STEPS, **shares
    )
    assert float(row["train/learning_rate"]) == pytest.approx(expected, rel=1e-4)


def test_a_checkpoint_without_its_place_in_the_data_is_refused(tmp_path):
    train(tmp_path / "run", max_steps=2)
    file = tmp_path / "run/checkpoints/last.ckpt"
    checkpoint = torch.load(file, weights_only=True)
    del checkpoint["TinyData"]
    torch.save(checkpoint, file)
    with pytest.raises(CheckpointError, match=r"last\.ckpt: .* it has no TinyData\.cursor") as error:
        train(tmp_path / "run", max_steps=4, resume=True)
    assert "\n" not in str(error.value)

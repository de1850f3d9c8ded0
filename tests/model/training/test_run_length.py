"""Runs that end after measured seconds: what the clock counts, what the schedule follows, and how they resume."""

from types import SimpleNamespace

import lightning
import pytest
import torch
from stand_ins import OPTIMIZER, train

from model.training.efficiency import SKIPPED_STEPS
from model.training.metrics import read_rows
from model.training.optimizer import TIMED_SCHEDULE_STEPS, build_schedule, cosine

LINEAR = OPTIMIZER | {
    "schedule": dict(name="warmup_stable_decay", warmup_fraction=0.0, decay_fraction=1.0, final_fraction=0.0)
}


class Clock(lightning.Callback):
    """A step takes 1 second; a validation takes 100, and so does a save."""

    def __init__(self):
        self.now = 0.0

    def on_before_optimizer_step(self, *_):
        self.now += 1.0

    def on_validation_batch_end(self, *_):
        self.now += 100.0

    def on_save_checkpoint(self, *_):
        self.now += 100.0


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr("model.training.efficiency.time", SimpleNamespace(perf_counter=lambda: clock.now))
    return clock


def rows(path):
    return read_rows(path / "metrics.csv")[1]


def test_seconds_end_a_run_without_its_first_steps_validations_and_saves(tmp_path, clock):
    result = train(
        tmp_path, max_steps=None, max_seconds=10, validate_every=4, save_every=3, log_every=5, callbacks=[clock]
    )
    assert result.state == "finished"
    assert result.step == SKIPPED_STEPS + 10
    assert result.summary["measured_seconds"] == 10
    assert result.summary["train_seconds"] > 500
    assert [row["step"] for row in rows(tmp_path) if row["validation/loss"]] == ["4", "8", "12", "13"]
    assert [row["step"] for row in rows(tmp_path) if row["train/loss"]] == ["5", "10", "13"]


def test_seconds_end_a_run_that_has_no_validation(tmp_path, clock):
    result = train(tmp_path, max_steps=None, max_seconds=4, validate_every=None, callbacks=[clock])
    assert result.state == "finished" and result.step == SKIPPED_STEPS + 4
    assert torch.load(result.last, weights_only=True)["global_step"] == SKIPPED_STEPS + 4


def test_what_comes_first_ends_a_run(tmp_path, clock):
    assert train(tmp_path / "a", max_steps=6, max_seconds=1000, callbacks=[clock]).step == 6
    assert train(tmp_path / "b", max_steps=600, max_seconds=5, callbacks=[clock]).step == SKIPPED_STEPS + 5


def test_the_learning_rate_follows_the_seconds(tmp_path, clock):
    train(tmp_path, optimizer=LINEAR, max_steps=None, max_seconds=10, validate_every=4, callbacks=[clock])
    rates = [float(row["train/learning_rate"]) for row in rows(tmp_path) if row["train/learning_rate"]]
    done = [0] * (SKIPPED_STEPS + 2) + list(range(1, 9))  # seconds at the end of the step before the last one
    assert rates == pytest.approx([0.01 * (1 - seconds / 10) for seconds in done])


def test_a_schedule_of_shares_is_that_of_steps():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    share = 0.0
    schedule = build_schedule(optimizer, 1, lambda: share, **OPTIMIZER["schedule"])
    for share in (0.1, 0.37, 0.5, 0.99, 1.0, 1.3):
        optimizer.step()
        schedule.step()
        expected = cosine(
            min(TIMED_SCHEDULE_STEPS, round(share * TIMED_SCHEDULE_STEPS)),
            TIMED_SCHEDULE_STEPS,
            warmup_fraction=0.2,
            final_fraction=0.1,
        )
        assert optimizer.param_groups[0]["lr"] == pytest.approx(expected)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1)


class StopAfter(lightning.Callback):
    def __init__(self, step: int):
        self.step = step

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if trainer.global_step == self.step - 1:
            next(c for c in trainer.callbacks if type(c).__name__ == "Interrupt").received = "test"


def test_a_resumed_run_keeps_its_seconds_and_its_learning_rate(tmp_path, clock):
    settings = dict(optimizer=LINEAR, max_steps=None, max_seconds=10, validate_every=4)
    first = train(tmp_path, callbacks=[clock, StopAfter(9)], **settings)
    assert first.state == "interrupted" and first.summary["measured_seconds"] == 9 - SKIPPED_STEPS
    result = train(tmp_path, resume=True, callbacks=[clock], **settings)
    assert result.step == 9 + SKIPPED_STEPS + (10 - (9 - SKIPPED_STEPS))  # a session's first steps are not counted
    assert result.summary["measured_seconds"] == 10
    rates = [float(row["train/learning_rate"]) for row in rows(tmp_path) if row["train/learning_rate"]]
    assert rates[9:13] == pytest.approx([0.005, 0.004, 0.004, 0.004])
    assert rates == sorted(rates, reverse=True)


@pytest.mark.parametrize("validate_every", [4, None])
def test_a_run_whose_seconds_are_up_ends_at_once_when_it_is_resumed(tmp_path, clock, validate_every):
    settings = dict(max_steps=None, max_seconds=6, validate_every=validate_every)
    first = train(tmp_path, callbacks=[clock], **settings)
    weights = torch.load(first.last, weights_only=True)["state_dict"]
    again = train(tmp_path, resume=True, callbacks=[clock], **settings)
    assert again.state == "finished" and again.step == first.step
    assert again.summary["measured_seconds"] == 6
    after = torch.load(again.last, weights_only=True)["state_dict"]
    assert all(torch.equal(weights[key], after[key]) for key in weights)
    assert len([row for row in rows(tmp_path) if row["train/loss"]]) == first.step

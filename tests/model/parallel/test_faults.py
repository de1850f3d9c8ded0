"""A rank that is killed, hangs or fails: all ranks end, one line appears, and the run can be resumed."""

import csv
import re

import pytest
import torch

from tests.model.parallel import training
from tests.model.parallel.faults import STEPS, run_with_fault

LOGGED = ("Initializing distributed", "INFO: Initializing distributed", "attention backend")
STEP = re.compile(r"step \d+/")


def messages(ended) -> list[str]:
    return [line for line in ended.lines if not line.startswith(LOGGED) and not STEP.match(line)]


@pytest.fixture(scope="module")
def stopped_four_times(tmp_path_factory):
    """One run that is stopped by signals, and then by the end of a rank, and resumed after each."""
    path = tmp_path_factory.mktemp("stopped") / "run"
    faults = [("Ctrl-C", 0, 1), ("SIGTERM", 0, 3), ("SIGUSR1", 0, 5), ("SIGKILL", 1, 7)]
    ended = {name: run_with_fault(path, fault=name, rank=rank, step=step) for name, rank, step in faults}
    return path, ended, run_with_fault(path)


@pytest.mark.parametrize(("name", "step"), [("Ctrl-C", 2), ("SIGTERM", 4), ("SIGUSR1", 6)])
def test_a_signal_to_all_ranks_or_one_saves_once(stopped_four_times, name, step):
    path, ended, _ = stopped_four_times
    asked, interrupted = messages(ended[name])
    signal = "SIGINT" if name == "Ctrl-C" else name
    assert asked.startswith(signal)
    assert interrupted.startswith(f"interrupted by {signal} at step {step}") and f"resume={path}" in interrupted
    assert (ended[name].status, ended[name].summary["state"], ended[name].summary["step"]) == (130, "interrupted", step)


def test_a_killed_rank_ends_the_other(stopped_four_times):
    path, ended, _ = stopped_four_times
    (line,) = messages(ended["SIGKILL"])
    assert "rank 1" in line and "SIGKILL" in line and f"resume={path}" in line
    assert ended["SIGKILL"].status == 2 and ended["SIGKILL"].summary["state"] == "failed"
    assert "Traceback" in (path / "train.log").read_text()


def test_losses_are_those_of_a_run_that_was_never_stopped(stopped_four_times, tmp_path):
    path, _, finished = stopped_four_times
    assert finished.status == 0 and finished.summary["step"] == STEPS and not messages(finished)
    straight = training.train(tmp_path / "straight", max_steps=STEPS, validate_every=None)
    with open(path / "metrics.csv") as file:
        losses = [float(row["train/loss"]) for row in csv.DictReader(file)]
    torch.testing.assert_close(losses, [row[0] for row in straight], rtol=0, atol=1e-9)


def test_the_other_rank_ends_with_rank_0(tmp_path):
    ended = run_with_fault(tmp_path / "run", fault="SIGKILL", rank=0, step=2, strategy="fsdp2")
    (line,) = messages(ended)
    assert ended.status == -9
    assert "rank 0" in line and f"resume={tmp_path / 'run'}" in line


@pytest.mark.parametrize(("rank", "strategy"), [(0, "ddp"), (1, "fsdp2")])
def test_a_rank_that_hangs_ends_all(tmp_path, rank, strategy):
    settings = dict(fault="SIGSTOP", rank=rank, step=2, strategy=strategy, rank_timeout=6)
    ended = run_with_fault(tmp_path / "run", **settings)
    assert ended.status not in (0, None)
    (line,) = messages(ended)
    assert "trainer.rank_timeout=6" in line and f"resume={tmp_path / 'run'}" in line


@pytest.mark.parametrize(
    ("rank", "fault", "state"),
    [
        (0, "out of memory", "out of memory"),
        (1, "error", "failed"),
        (None, "out of memory", "out of memory"),
        (None, "error", "failed"),
    ],
)
def test_an_error_of_one_rank_or_of_all_is_one_line(tmp_path, rank, fault, state):
    ended = run_with_fault(tmp_path / "run", fault=fault, rank=rank, step=2)
    assert (ended.status, ended.summary["state"]) == (2, state)
    (line,) = messages(ended)
    assert {"error": "document 17", "out of memory": "7.00 GiB"}[fault] in line


def test_a_bug_on_one_rank_is_its_traceback_alone(tmp_path):
    ended = run_with_fault(tmp_path / "run", fault="bug", rank=1, step=2)
    assert ended.status == 2 and ended.summary["state"] == "failed"
    assert sum("Traceback" in line for line in ended.lines) == 1
    assert sum("AttributeError: a bug" in line for line in ended.lines) == 1 and "gloo" not in "".join(ended.lines)

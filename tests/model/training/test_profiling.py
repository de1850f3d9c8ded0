import gzip
import json
import time
from types import SimpleNamespace

import pytest
import torch
from stand_ins import train

from kernels.layout.cost import AttentionCost
from model.training import profiling
from model.training.efficiency import SKIPPED_STEPS, Efficiency, FetchTimer
from model.training.metrics import read_rows
from model.training.profiling import FIRST_STEP, length, record, step_profile
from model.transformer import ModelCost


@pytest.mark.parametrize(
    ("intervals", "expected"),
    [
        ([], 0),
        ([(1, 3), (5, 6)], 3),
        ([(5, 6), (1, 3), (2, 4)], 4),
        ([(0, 10), (2, 3), (4, 5)], 10),
        ([(0, 1), (1, 2)], 2),
    ],
)
def test_length_of_a_union(intervals, expected):
    assert length(intervals) == expected


def test_a_run_profiles_its_steps(tmp_path):
    train(tmp_path, max_steps=FIRST_STEP + 4, validate_every=None, profile=2)
    found = json.loads((tmp_path / "profile.json").read_text())
    assert found["steps"] == 2 and found["busy"] > 0 and found["step"] > 0
    calls = {name: count for name, _, count in found["kernels"]}
    assert calls["aten::tanh"] == 1, "one a step"
    with gzip.open(tmp_path / "trace.json.gz") as file:
        assert json.load(file)["traceEvents"]


def test_profiled_steps_count_in_no_speed(tmp_path, monkeypatch):
    """As if writing the profile took a second."""
    monkeypatch.setattr(profiling, "write_json", lambda *_: time.sleep(1))
    result = train(tmp_path, max_steps=FIRST_STEP + 4, validate_every=None, profile=2)
    rows = [bool(row["tokens_per_second"]) for row in read_rows(tmp_path / "metrics.csv")[1]]
    assert rows == [False] * SKIPPED_STEPS + [True] * (FIRST_STEP - SKIPPED_STEPS) + [False] * 2 + [True] * 2
    assert result.summary["measured_seconds"] < 1 < result.summary["train_seconds"]
    assert result.summary["train_tokens"] == (FIRST_STEP + 4) * 2 * 16


def test_waiting_for_batches_of_profiled_steps_counts_in_no_share(tmp_path):
    """A logged step within the profile ends the window of the steps before the profile."""
    timer = FetchTimer()
    module = SimpleNamespace(device=torch.device("cpu"), batch_tokens=8, stepped=True, recorder=None)
    efficiency = Efficiency(timer)
    module.step_cost = lambda: (ModelCost(AttentionCost(1, 1, 1, 1), 1, 1), 8)
    trainer = SimpleNamespace(world_size=1, precision="32-true")
    module.trainer = trainer
    for _ in range(SKIPPED_STEPS + 1):
        efficiency.on_train_batch_start(trainer, module)
        efficiency.on_train_batch_end(trainer, module)
    efficiency.hold(module)
    timer.seconds += 100.0
    assert efficiency.measure(module)["data_wait_share"] == 0


def test_a_run_that_ends_before_its_profile_warns_and_writes_none(tmp_path, caplog):
    train(tmp_path, max_steps=FIRST_STEP + 1, validate_every=None, profile=2)
    assert not (tmp_path / "profile.json").exists()
    assert "trainer.profile=2" in caplog.text
    caplog.clear()
    train(tmp_path / "longer", max_steps=FIRST_STEP + 2, validate_every=None, profile=2)
    assert "trainer.profile" not in caplog.text


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_busy_and_exposed_time_on_a_gpu():
    x = torch.randn(4096, 4096, device="cuda")
    torch.cuda.synchronize()
    with record() as profiler:
        started = time.perf_counter()
        x @ x
        torch.cuda.synchronize()
        time.sleep(0.2)
        seconds = time.perf_counter() - started
    found = step_profile(profiler, seconds, 1)
    assert 0 < found.busy < found.step - 100
    assert found.communication == found.exposed == 0
    assert found.kernels[0][2] == 1

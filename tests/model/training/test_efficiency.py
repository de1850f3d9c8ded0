import time
from types import SimpleNamespace

import lightning
import pytest
import torch
from stand_ins import Sequences, TinyData, train
from torch.utils.data import DataLoader

from model.training import efficiency
from model.training.efficiency import SKIPPED_STEPS, peak_flops
from model.training.metrics import read_rows


def test_every_number_of_the_plan_is_there(tmp_path):
    result = train(tmp_path, max_steps=8, accumulate=2)
    summary = result.summary
    assert summary["tokens_per_second"] > 0 and summary["step_seconds"] > 0
    assert summary["peak_memory_bytes"] > 50e6
    logged = [float(row["density_pairs"]) for row in read_rows(tmp_path / "metrics.csv")[1] if row["density_pairs"]]
    assert summary["density_pairs"] == pytest.approx(sum(logged) / len(logged)) and len(set(logged)) > 1
    assert summary["density_tiles"] == 0.5
    assert (summary["attention_flops_per_token"], summary["flops_per_token"]) == (12, 100)
    assert summary["mfu_exact"] is None and summary["mfu_dense_equivalent"] is None  # a CPU's peak is not known
    assert summary["train_tokens"] == 8 * 2 * 2 * 16
    assert summary["parameters"] == 256 and summary["seed"] == 3 and len(summary["config_hash"]) == 12
    assert set(summary["versions"]) == {"python", "torch", "lightning"}


def test_first_steps_are_left_out(tmp_path):
    train(tmp_path, max_steps=6, validate_every=None)
    rows = read_rows(tmp_path / "metrics.csv")[1]
    assert [bool(row["tokens_per_second"]) for row in rows] == [False] * SKIPPED_STEPS + [True] * 3


def test_a_callback_that_saves_within_a_logged_step_stops_no_run(tmp_path):
    """Saving stops the clock, and the step is measured while it stands."""

    class SaveWithin(lightning.Callback):
        def on_before_optimizer_step(self, trainer, module, optimizer):
            trainer.save_checkpoint(tmp_path / "other.ckpt", weights_only=False)

    result = train(tmp_path, max_steps=6, validate_every=None, callbacks=[SaveWithin()])
    assert (result.state, result.step) == ("finished", 6)
    rows = read_rows(tmp_path / "metrics.csv")[1]
    assert all(float(row["step_seconds"]) > 0 for row in rows[SKIPPED_STEPS:])
    assert result.summary["measured_seconds"] > 0


def test_the_most_memory_of_other_processes_is_recorded_over_all_sessions(tmp_path, monkeypatch):
    assert train(tmp_path / "cpu", max_steps=1).summary["memory_bytes_of_others"] is None
    found = iter([5, 9])
    monkeypatch.setattr(efficiency, "bytes_of_others", lambda device: next(found, 7))
    for steps in (4, 6):
        assert train(tmp_path, resume=steps > 4, max_steps=steps).summary["memory_bytes_of_others"] == 9
    assert train(tmp_path / "other", max_steps=1).summary["memory_bytes_of_others"] == 7


def test_a_run_too_short_to_measure_says_so(tmp_path):
    summary = train(tmp_path, max_steps=2).summary
    assert summary["tokens_per_second"] is None and summary["step_seconds"] is None


def test_waiting_for_data_is_seen_and_validation_is_not_counted(tmp_path):
    class SlowSequences(Sequences):
        def __getitem__(self, index):
            time.sleep(0.02)
            return super().__getitem__(index)

    class SlowData(TinyData):
        def train_dataloader(self):
            loader = super().train_dataloader()
            return DataLoader(SlowSequences(7, 1), self.batch_size, sampler=loader.sampler)

        def val_dataloader(self):
            return DataLoader(SlowSequences(15, 2), self.batch_size)

    summary = train(tmp_path, data=SlowData(), max_steps=12, validate_every=5, log_every=2).summary
    assert summary["data_wait_share"] > 0.5
    assert 0.04 <= summary["step_seconds"] < 0.15  # a validation takes 0.3 s


def test_tokens_and_seconds_add_up_over_sessions(tmp_path):
    train(tmp_path, max_steps=4)
    first = train(tmp_path, max_steps=4, resume=True).summary
    second = train(tmp_path, max_steps=8, resume=True).summary
    assert second["train_tokens"] == 2 * first["train_tokens"] == 8 * 2 * 16
    assert second["train_seconds"] > first["train_seconds"]


@pytest.mark.parametrize(
    ("name", "precision", "expected"),
    [
        ("NVIDIA H100 80GB HBM3", "bf16-mixed", 989e12),
        ("NVIDIA H100 PCIe", "bf16-mixed", 756e12),
        ("NVIDIA H200", "bf16-true", 989e12),
        ("NVIDIA A100-SXM4-80GB", "16-mixed", 312e12),
        ("NVIDIA L40S", "bf16-mixed", 362e12),
        ("NVIDIA L4", "bf16-mixed", 121e12),
        ("NVIDIA L40", "bf16-mixed", None),
        ("NVIDIA A10G", "bf16-mixed", None),
        ("NVIDIA H100 80GB HBM3", "32-true", None),
        ("Some Other GPU", "bf16-mixed", None),
    ],
)
def test_peak_flops_are_known_or_none(monkeypatch, name, precision, expected):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: name)
    assert peak_flops(torch.device("cuda"), precision) == expected


def test_peak_flops_of_a_cpu_is_none():
    assert peak_flops(torch.device("cpu"), "bf16-mixed") is None


def test_mfu_where_the_peak_is_known(tmp_path, monkeypatch):
    monkeypatch.setattr(efficiency, "peak_flops", lambda *_: 1e9)
    summary = train(tmp_path, max_steps=8, log_every=4).summary
    assert summary["mfu_exact"] == pytest.approx(100 * summary["tokens_per_second"] / 1e9, rel=0.5)
    assert summary["mfu_dense_equivalent"] == pytest.approx(4 * summary["mfu_exact"])


def test_cost_is_of_the_batch_that_ran(tmp_path, monkeypatch):
    import stand_ins

    seen = []
    monkeypatch.setattr(stand_ins.TinyModel, "build_layouts", lambda self, document, length: [length, document.sum()])
    monkeypatch.setattr(
        stand_ins.TinyModel,
        "cost",
        lambda self, layouts, batch: (
            seen.append((*layouts, batch))
            or SimpleNamespace(
                attention=SimpleNamespace(density_pairs=1, density_tiles=1, flops=1), flops=1, dense_flops=1
            )
        ),
    )
    train(tmp_path, max_steps=4, log_every=2, validate_every=None)
    assert len(seen) == 2 and all(length == 16 and batch == 2 for length, _, batch in seen)

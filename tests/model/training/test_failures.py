"""Runs that end before their time: out of memory, and with a loss that is no number."""

import json
import signal
from itertools import pairwise
from types import SimpleNamespace

import lightning
import pytest
import torch
from stand_ins import TRAINER, TinyData, TinyModel, new_module, run_folder

from model.training.checkpoints import CheckpointFile
from model.training.failures import DivergedError, RunOutOfMemoryError, is_out_of_memory
from model.training.fit import fit
from model.training.metrics import read_rows


class Exploding(TinyModel):
    """Fails in the forward pass of a given call, as an allocator does."""

    def __init__(self, error: BaseException, at: int):
        super().__init__()
        self.error, self.at, self.calls = error, at, 0

    def loss(self, *arguments):
        self.calls += 1
        if self.calls == self.at:
            raise self.error
        return super().loss(*arguments)


class Poisoned(TinyModel):
    """Its loss is NaN in the given calls while it trains."""

    def __init__(self, *at: int):
        torch.manual_seed(0)  # runs that are compared begin with equal weights, whatever ran before in this process
        super().__init__(dropout=0.0)
        self.at, self.calls = at, 0

    def loss(self, *arguments) -> SimpleNamespace:
        out = super().loss(*arguments)
        if self.training:
            self.calls += 1
            if self.calls in self.at:
                out.total = out.total * torch.nan
                out.per_token = out.per_token * torch.nan
        return out


class NamedData(TinyData):
    def document_names(self, first: int, last: int) -> list[str]:
        return [f"book {sample}" for sample in range(first, last)]


class StopAt(lightning.Callback):
    """Asks for an end behind a step, as a cluster does."""

    def __init__(self, step: int):
        self.step = step

    def on_train_batch_start(self, trainer, *_):
        if trainer.global_step == self.step - 1:
            signal.raise_signal(signal.SIGTERM)


def session(path, model, resume=False, data=None, forecast=None, **changes):
    folder = run_folder(path)
    checkpoint = CheckpointFile(folder.checkpoints / "last.ckpt") if resume else None
    module = new_module(model=model)
    return fit(module, data or NamedData(), folder, resume=checkpoint, forecast=forecast, **(TRAINER | changes)), module


def summary_of(path):
    return json.loads((path / "summary.json").read_text())


CPU_ERROR = RuntimeError(
    "[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate "
    "123 bytes. Error code 12 (Cannot allocate memory)"
)


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB."), CPU_ERROR, MemoryError()],
    ids=["cuda", "cpu", "python"],
)
def test_out_of_memory_is_one_line_with_forecast_and_advice(tmp_path, error):
    forecast = {"peak_memory_bytes": 7_500_000_000}
    with pytest.raises(RunOutOfMemoryError) as caught:
        session(tmp_path, Exploding(error, at=3), forecast=forecast, validate_every=None)
    message = str(caught.value)
    assert "\n" not in message and message.startswith("step 3: out of memory on the CPU")
    assert "the forecast was 7.50 GB" in message
    assert all(key in message for key in ("data.batch_size", "data.sequence_length", "model.activation_checkpointing"))
    assert str(error).split(". ")[0].split("\n")[0][:30] in message
    summary = summary_of(tmp_path)
    assert summary["state"] == "out of memory" and summary["step"] == 2
    assert summary["forecast"] == {"peak_memory_bytes": 7_500_000_000}


def test_what_a_real_allocator_says_is_recognized():
    with pytest.raises((RuntimeError, MemoryError)) as caught:
        torch.empty(1 << 60)
    assert is_out_of_memory(caught.value)


def test_another_error_is_no_lack_of_memory(tmp_path):
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    with pytest.raises(RuntimeError, match="shapes"):
        session(tmp_path, Exploding(RuntimeError("shapes"), at=2), validate_every=None)
    assert summary_of(tmp_path)["state"] == "failed"


def test_a_nan_stops_with_its_step_documents_and_checkpoint(tmp_path):
    with pytest.raises(DivergedError) as caught:
        session(tmp_path, Poisoned(9, 10), accumulate=2, save_every=2, validate_every=None, log_every=3)
    message = str(caught.value)
    # Micro-batches 9 and 10 are step 5's, of two samples each: 16 to 19. It is seen when step 6 is logged or saved.
    assert message.startswith("step 5: ") and "its batch holds book 16, book 17, book 18, book 19;" in message
    assert f"the last good checkpoint is {tmp_path}/checkpoints/last.ckpt" in message and "\n" not in message
    saved = torch.load(tmp_path / "checkpoints/last.ckpt", weights_only=True)
    assert saved["global_step"] == 4
    assert summary_of(tmp_path)["state"] == "failed"


def test_a_skipped_step_changes_neither_weights_nor_optimizer(tmp_path):
    seen = []

    class Snapshots(lightning.Callback):
        def on_train_batch_end(self, trainer, module, *_):
            (optimizer,) = trainer.optimizers
            weights = [p.detach().clone() for p in module.parameters()]
            state = [v.clone() for p in module.parameters() for v in optimizer.state[p].values()]
            seen.append((weights + state, optimizer.param_groups[0]["lr"]))

    settings = {"on_nan": "skip_step", "max_skipped_steps": 1, "validate_every": None, "callbacks": [Snapshots()]}
    result, _ = session(tmp_path, Poisoned(4), **settings)
    assert result.state == "finished" and result.step == 12 and result.summary["skipped_steps"] == 1
    same = [all(map(torch.equal, now[0], then[0])) for then, now in pairwise(seen)]
    assert same == [False, False, True, *[False] * 8]  # step 4 alone left everything as it was
    plain, _ = session(tmp_path / "plain", Poisoned(), validate_every=None, callbacks=[Snapshots()])
    assert [rate for _, rate in seen[:12]] == [rate for _, rate in seen[12:]], "the schedule goes on"
    assert plain.summary.get("skipped_steps") is None
    rows = read_rows(tmp_path / "metrics.csv")[1]
    assert [row["train/skipped_steps"] for row in rows] == ["0"] * 3 + ["1"] * 9


def test_more_skipped_steps_than_the_cap_end_the_run_over_all_sessions(tmp_path):
    settings = {"on_nan": "skip_step", "max_skipped_steps": 2, "validate_every": None, "save_every": 1}
    session(tmp_path, Poisoned(2, 3), max_steps=4, **settings)
    said = r"step 6: .*the 3\. such step, and trainer.max_skipped_steps allows 2; .*book 10"
    with pytest.raises(DivergedError, match=said):
        session(tmp_path, Poisoned(2), resume=True, max_steps=8, **settings)


def test_skipping_is_bitwise_resumable(tmp_path):
    settings = {"on_nan": "skip_step", "max_skipped_steps": 2, "validate_every": None, "save_every": 1}
    _, whole = session(tmp_path / "whole", Poisoned(3, 6), **settings)
    session(tmp_path / "parts", Poisoned(3), **(settings | {"max_steps": 12, "callbacks": [StopAt(4)]}))
    _, resumed = session(tmp_path / "parts", Poisoned(2), resume=True, **settings)
    assert all(map(torch.equal, whole.parameters(), resumed.parameters()))
    assert whole.checks.skipped_steps == resumed.checks.skipped_steps == 2

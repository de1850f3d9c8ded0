import subprocess
import sys
from pathlib import Path

import pytest
import torch
from stand_ins import TRAINER, BestAt, TinyData, TinyModel, new_module, run_folder, train

from model.training.checkpoints import AtomicCheckpointIO, CheckpointError, load_weights, read_checkpoint
from model.training.fit import fit

REPOSITORY = Path(__file__).parents[3]

DIE_WHILE_WRITING = """
import os, signal, sys, torch
from model.training.checkpoints import AtomicCheckpointIO

class Deadly:
    def __reduce__(self):  # reached when part of the file has been written
        os.kill(os.getpid(), signal.SIGKILL)

AtomicCheckpointIO().save_checkpoint({"state_dict": {}, "weights": torch.ones(1 << 20), "last": Deadly()}, sys.argv[1])
"""


def test_a_kill_in_the_middle_of_a_write_leaves_the_old_checkpoint(tmp_path):
    path = tmp_path / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint({"state_dict": {"x": torch.ones(3)}, "step": 7}, path)
    died = subprocess.run([sys.executable, "-c", DIE_WHILE_WRITING, str(path)], cwd=REPOSITORY, check=False)
    assert died.returncode == -9
    assert read_checkpoint(path)["step"] == 7


@pytest.mark.parametrize("moment", ["torch.save", "os.fsync"])
def test_a_full_disk_leaves_the_old_checkpoint(tmp_path, monkeypatch, moment):
    def fail(*arguments):
        if moment == "torch.save":
            arguments[1].write(b"half")
        raise OSError("No space left on device")

    path = tmp_path / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint({"state_dict": {}, "step": 7}, path)
    monkeypatch.setattr(moment, fail)
    with pytest.raises(OSError, match="No space"):
        AtomicCheckpointIO().save_checkpoint({"state_dict": {}, "step": 8}, path)
    monkeypatch.undo()
    assert read_checkpoint(path)["step"] == 7


def test_best_is_the_lowest_validation_loss(tmp_path):
    result = train(tmp_path, max_steps=8, validate_every=2, callbacks=[BestAt(4)])
    assert read_checkpoint(result.best)["global_step"] == 4
    assert read_checkpoint(result.last)["global_step"] == 8


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not a readable checkpoint"),
        (b"PK\x03\x04 half a zip", "is not a readable checkpoint"),
    ],
)
def test_unreadable_files(tmp_path, content, message):
    (tmp_path / "broken.ckpt").write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        read_checkpoint(tmp_path / "broken.ckpt")


def test_code_in_a_checkpoint_is_not_run(tmp_path):
    torch.save({"state_dict": {}, "trap": Path("x")}, tmp_path / "trap.ckpt")
    with pytest.raises(CheckpointError, match="is not a readable checkpoint"):
        read_checkpoint(tmp_path / "trap.ckpt")


def test_missing_and_foreign_files(tmp_path):
    with pytest.raises(CheckpointError, match="no checkpoint at"):
        read_checkpoint(tmp_path / "none.ckpt")
    torch.save({"weights": 1}, tmp_path / "foreign.ckpt")
    with pytest.raises(CheckpointError, match="has no state_dict"):
        read_checkpoint(tmp_path / "foreign.ckpt")


def test_init_from_loads_weights_alone(tmp_path):
    result = train(tmp_path, max_steps=2)
    model = TinyModel()
    load_weights(model, result.best)
    saved = read_checkpoint(result.best)["state_dict"]
    for name, parameter in model.state_dict().items():
        assert torch.equal(parameter, saved[f"model.{name}"])


def test_init_from_names_every_key_that_differs(tmp_path):
    result = train(tmp_path, max_steps=2)
    model = TinyModel()
    del model.norm
    model.extra = torch.nn.Linear(2, 2, bias=False)
    model.lm_head = torch.nn.Linear(8, 13, bias=False)
    with pytest.raises(CheckpointError) as error:
        load_weights(model, result.best)
    message = str(error.value)
    assert "the model has no norm.weight" in message
    assert "the checkpoint has no extra.weight" in message
    assert "lm_head.weight is [11, 8] in the checkpoint and [13, 8] in the model" in message


def test_resuming_with_another_model_names_the_keys(tmp_path):
    result = train(tmp_path, max_steps=2)
    model = TinyModel()
    model.hidden = torch.nn.Linear(8, 8, bias=False)
    with pytest.raises(CheckpointError, match=r"the model has no model\.hidden\.bias"):
        fit(new_module(model=model), TinyData(), run_folder(tmp_path), resume=result.last, **TRAINER)

import pickle
import traceback
from pathlib import Path

import pytest
import torch
from stand_ins import TRAINER, BestAt, TinyData, TinyModel, new_module, run_folder, train

from configs.runs import open_run
from model.training.checkpoints import (
    OPTIONAL,
    AtomicCheckpointIO,
    CheckpointError,
    CheckpointFile,
    load_weights,
    read_checkpoint,
)
from model.training.fit import fit
from tests.commands import ROOT, run_forked

DIE_WHILE_WRITING = """
import os, signal, sys, torch
from model.training.checkpoints import AtomicCheckpointIO

class Deadly:
    def __reduce__(self):  # reached when part of the file has been written
        os.kill(os.getpid(), signal.SIGKILL)

AtomicCheckpointIO().save_checkpoint({"state_dict": {}, "weights": torch.ones(1 << 20), "last": Deadly()}, sys.argv[1])
"""


def test_a_kill_in_the_middle_of_a_write_leaves_the_old_checkpoint(tmp_path):
    path, program = tmp_path / "last.ckpt", tmp_path / "die.py"
    AtomicCheckpointIO().save_checkpoint({"state_dict": {"x": torch.ones(3)}, "step": 7}, path)
    program.write_text(DIE_WHILE_WRITING)
    died = run_forked(str(program), str(path), check=False, PYTHONPATH=str(ROOT))
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
    torch.save({"state_dict": {}}, tmp_path / "foreign.ckpt")
    with pytest.raises(CheckpointError, match="has no hyper_parameters"):
        open_run(tmp_path / "foreign.ckpt", "cpu", "32-true")


@pytest.mark.parametrize("trap", [Path("x"), torch.nn.Linear(2, 2), torch.load])
def test_a_refused_file_is_one_line_without_advice_to_run_its_code(tmp_path, trap):
    torch.save({"state_dict": {}, "trap": trap}, tmp_path / "trap.ckpt")
    with pytest.raises(CheckpointError, match=r"it names .*, and must hold only tensors") as error:
        read_checkpoint(tmp_path / "trap.ckpt")
    shown = "".join(traceback.format_exception(error.value))
    assert "weights_only" not in shown.partition("CheckpointError")[2] and "add_safe_globals" not in shown
    assert "\n" not in str(error.value)


def test_no_way_of_being_broken_quotes_advice_to_run_its_code(tmp_path):
    content = pickle.dumps({"state_dict": Path("x")}), b"\0" * 5000, b"text", b"", b"PK\3\4" + bytes(900)
    for number, broken in enumerate(content):
        file = tmp_path / f"{number}.ckpt"
        file.write_bytes(broken)
        with pytest.raises(CheckpointError, match=f"{number}.ckpt is not a readable checkpoint: it is ") as error:
            read_checkpoint(file)
        assert "weights_only" not in str(error.value)


def damage(path: Path, how: str) -> None:
    content = path.read_bytes()
    middle = len(content) // 2
    path.write_bytes(content[:middle] + (b"" if how == "truncated" else b"\xff" * 40 + content[middle + 40 :]))


@pytest.mark.parametrize("how", ["truncated", "damaged"])
@pytest.mark.parametrize(("broken", "whole"), [("last", "best"), ("best", "last")])
def test_a_broken_checkpoint_names_the_other_one_and_changes_nothing(tmp_path, how, broken, whole):
    result = train(tmp_path, max_steps=8, validate_every=2, callbacks=[BestAt(4)])
    damage(tmp_path / f"checkpoints/{broken}.ckpt", how)
    files = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    broken_file = getattr(result, broken)
    with pytest.raises(CheckpointError, match=f"{broken}.ckpt is not a readable checkpoint: it is {how}") as error:
        fit(new_module(), TinyData(), run_folder(tmp_path), resume=CheckpointFile(broken_file), **TRAINER)
    assert f"{tmp_path / whole}, of step {4 if whole == 'best' else 8}" in str(error.value)
    assert {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == files

    damage(tmp_path / f"checkpoints/{whole}.ckpt", "truncated")
    with pytest.raises(CheckpointError) as error:
        fit(new_module(), TinyData(), run_folder(tmp_path), resume=CheckpointFile(broken_file), **TRAINER)
    assert whole not in str(error.value).replace(str(tmp_path), "")


def test_whatever_is_missing_in_a_checkpoint_is_one_line(tmp_path):
    """Every key but those without which Lightning goes on as well."""
    path = train(tmp_path, max_steps=2).last
    whole = torch.load(path, weights_only=True)
    own = {"callbacks": whole["callbacks"]}
    for key, state in own["callbacks"].items():
        own[key] = state
    named = 0
    for holder, key in [(mapping, key) for mapping in (whole, *own.values()) for key in list(mapping)]:
        if key in ("hparams_name", "skipped_steps", "ends", *OPTIONAL):
            continue
        value = holder.pop(key)
        torch.save(whole, path)
        with pytest.raises(CheckpointError, match=key) as error:
            fit(new_module(), TinyData(), run_folder(tmp_path), resume=CheckpointFile(path), **TRAINER)
        assert "\n" not in str(error.value)
        named += 1
        holder[key] = value
    assert named > 12
    torch.save(whole | {"optimizer_states": []}, path)
    with pytest.raises(CheckpointError, match=r"it has no optimizer_states; to start a new run .* give init_from="):
        fit(new_module(), TinyData(), run_folder(tmp_path), resume=CheckpointFile(path), **TRAINER)
    assert run_folder(tmp_path).read_summary()["state"] == "trained"


def test_init_from_loads_weights_alone(tmp_path):
    result = train(tmp_path, max_steps=2)
    model = TinyModel()
    load_weights(model, CheckpointFile(result.best))
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
        load_weights(model, CheckpointFile(result.best))
    message = str(error.value)
    assert "the model has no norm.weight" in message
    assert "the checkpoint has no extra.weight" in message
    assert "lm_head.weight is [11, 8] in the checkpoint and [13, 8] in the model" in message


def test_resuming_with_another_model_names_the_keys(tmp_path):
    result = train(tmp_path, max_steps=2)
    model = TinyModel()
    model.hidden = torch.nn.Linear(8, 8, bias=False)
    with pytest.raises(CheckpointError, match=r"the model has no model\.hidden\.bias"):
        fit(new_module(model=model), TinyData(), run_folder(tmp_path), resume=CheckpointFile(result.last), **TRAINER)


def test_a_checkpoint_file_is_read_again_only_after_it_was_replaced(tmp_path):
    path = tmp_path / "last.ckpt"
    io, file = AtomicCheckpointIO(), CheckpointFile(path)
    io.save_checkpoint({"state_dict": {"weight": torch.full((3,), 1.0)}}, path)
    first = file.read()
    assert file.read() is first
    io.save_checkpoint({"state_dict": {"weight": torch.full((3,), 2.0)}}, path)
    assert file.read()["state_dict"]["weight"].tolist() == [2, 2, 2]
    assert first["state_dict"]["weight"].tolist() == [1, 1, 1], "the replaced file stays readable"


def test_the_optimizers_state_is_handed_over_outside_of_the_file(tmp_path):
    """The next save replaces the file, while the optimizer of a CPU keeps the very tensors that it was given."""
    path = tmp_path / "last.ckpt"
    io = AtomicCheckpointIO()
    io.save_checkpoint({"state_dict": {}, "optimizer_states": [{"state": {0: {"exp_avg": torch.ones(3)}}}]}, path)
    loaded = io.load_checkpoint(path)
    with open(path, "r+b") as file:  # in place, which a memory map would show
        file.write(b"\0" * path.stat().st_size)
    assert loaded["optimizer_states"][0]["state"][0]["exp_avg"].tolist() == [1, 1, 1]

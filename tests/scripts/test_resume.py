"""Runs that are resumed by train.py: what they train, what they write down, and who may train in a folder."""

import json
import re
import signal
import sys
import types

import pytest
import torch
import yaml

from configs.build import build_loggers
from configs.runs import open_run
from data import DataModule
from kernels.patterns import Window
from model.training import run_folder as run_folders
from model.training.checkpoints import CheckpointError
from model.training.run_folder import RunFolder, RunFolderError
from tests.commands import resolved
from tests.scripts.runs import SMALL, write_books
from train import train

SHORT = ("trainer.max_steps=2", "trainer.validate_every=null", "evaluation=chunked", "evaluation.baselines=false")


@pytest.fixture
def settings(tmp_path):
    books = write_books(tmp_path / "books")
    place = ("data=files", f"data.path={books}", f"data.cache={tmp_path / 'cache'}", f"outputs={tmp_path}", "name=run")
    return (*SMALL, *place, *SHORT)


def only_run(tmp_path):
    (folder,) = (tmp_path / "run").iterdir()
    return RunFolder.open(folder)


def test_an_extended_run_that_is_stopped_goes_on_to_its_new_end(settings, tmp_path, monkeypatch):
    """2 steps, extended to 6, stopped at 4, resumed by the command that was printed: 6 steps, the last 3 in a second
    phase."""
    train(resolved(*settings, "phases=[{step: 0, data.sequence_length: 16}, {step: 3, data.sequence_length: 64}]"))
    folder = only_run(tmp_path)
    from model.training.module import LanguageModel

    step = LanguageModel.on_train_batch_start

    def stop_at_four(module, *arguments):
        if module.trainer.global_step == 3:
            signal.raise_signal(signal.SIGTERM)
        return step(module, *arguments)

    monkeypatch.setattr(LanguageModel, "on_train_batch_start", stop_at_four)
    stopped = train(resolved(f"resume={folder.path}", "trainer.max_steps=6"))
    monkeypatch.undo()
    assert (stopped["state"], stopped["step"]) == ("interrupted", 4)
    assert folder.read_config()["trainer"]["max_steps"] == 6 and folder.read_config()["resume"] is None
    assert "bits_per_byte" not in folder.read_summary(), "the evaluation after two steps is no result of this run"
    assert "trainer.max_steps=6, was 2" in folder.log_file.read_text()
    assert re.findall(r"phase (\d) of 2, from step \d: sequences of (\d+)", folder.log_file.read_text()) == [
        *(("1", "16"), ("1", "16"), ("2", "64"))
    ]
    ended = train(resolved(f"resume={folder.path}"))
    assert (ended["state"], ended["step"]) == ("finished", 6) and ended["bits_per_byte"] > 0


def test_a_run_with_nothing_left_to_do_trains_and_evaluates_nothing(settings, tmp_path, caplog):
    first = train(resolved(*settings))
    folder = only_run(tmp_path)
    before = {file: file.stat().st_mtime_ns for file in folder.path.rglob("*") if file.is_file()}
    with caplog.at_level("INFO"):
        assert train(resolved(f"resume={folder.path}")) == first
    assert "nothing to do" in caplog.text
    assert before == {file: file.stat().st_mtime_ns for file in folder.path.rglob("*") if file.is_file()}
    again = train(resolved(f"resume={folder.path}", "evaluation.protocol.window=32"))
    rows = json.loads((folder.path / "evaluation.json").read_text())["rows"]
    assert again["state"] == "finished" and len(rows) == 2, "another evaluation is something to do"


def test_a_run_killed_in_its_evaluation_is_trained_and_only_evaluates(settings, tmp_path, monkeypatch):
    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("configs.evaluation.evaluate_trained", killed)
        with pytest.raises(KeyboardInterrupt):
            train(resolved(*settings, "trainer.validate_every=2"))
    folder = only_run(tmp_path)
    summary = folder.read_summary()
    assert summary["state"] == "trained" and summary["step"] == 2
    assert summary["validation_loss"] > 0 and not set(run_folders.TEST_RESULTS) & set(summary)
    weights = (folder.checkpoints / "last.ckpt").read_bytes()
    ended = train(resolved(f"resume={folder.path}"))
    assert ended["state"] == "finished" and ended["bits_per_byte"] > 0
    assert (folder.checkpoints / "last.ckpt").read_bytes() == weights


def test_one_process_trains_in_a_folder(settings, tmp_path, monkeypatch):
    train(resolved(*settings))
    folder = only_run(tmp_path)
    monkeypatch.setattr(run_folders, "LOCK_SECONDS", 0.1)
    rows = folder.metrics_file.read_text()
    with folder.locked(), pytest.raises(RunFolderError, match=r"another process trains .*process \d+ on ") as error:
        train(resolved(f"resume={folder.path}", "trainer.max_steps=3"))
    assert "\n" not in str(error.value) and folder.metrics_file.read_text() == rows
    assert folder.read_config()["trainer"]["max_steps"] == 2
    assert train(resolved(f"resume={folder.path}", "trainer.max_steps=3"))["step"] == 3


def test_a_resumed_run_keeps_its_wandb_run(tmp_path, monkeypatch):
    made = []
    stand_in = types.SimpleNamespace(WandbLogger=lambda **settings: made.append(settings))
    monkeypatch.setitem(sys.modules, "lightning.pytorch.loggers", stand_in)
    folder = RunFolder.create(tmp_path / "run", {})
    logger = {"name": "wandb", "project": "p", "group": None, "tags": [], "mode": "offline"}
    for _ in range(2):
        build_loggers(logger, {}, folder)
    other = RunFolder.create(tmp_path / "other", {})
    build_loggers(logger, {}, other)
    ids = [settings["id"] for settings in made]
    assert ids[0] == ids[1] != ids[2] and all(settings["resume"] == "allow" for settings in made)


def counting(monkeypatch, owner, name):
    """The list that gets the arguments of each call of `owner.name` from here on."""
    calls, call = [], getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda *arguments, **named: calls.append(arguments) or call(*arguments, **named))
    return calls


def test_new_and_resumed_runs_are_set_up_once(settings, tmp_path, monkeypatch):
    data, patterns = counting(monkeypatch, DataModule, "__init__"), counting(monkeypatch, Window, "__post_init__")
    reads = counting(monkeypatch, torch, "load")
    train(resolved(*settings))
    assert (len(data), len(patterns), len(reads)) == (1, 1, 0)
    folder = only_run(tmp_path)
    assert train(resolved(f"resume={folder.path}", "trainer.max_steps=3"))["step"] == 3
    assert (len(data), len(patterns), len(reads)) == (2, 2, 1), "once in each run"


def test_a_config_is_replaced_only_if_its_run_can_continue(settings, tmp_path):
    train(resolved(*settings))
    folder = only_run(tmp_path)
    last = folder.checkpoints / "last.ckpt"
    content = torch.load(last, weights_only=True)
    torch.save({**content, "optimizer_states": []}, last)
    files = folder.config_file, folder.summary_file, folder.metrics_file
    before = [file.read_bytes() for file in files]
    with pytest.raises(CheckpointError, match="it has no optimizer_states"):
        train(resolved(f"resume={folder.path}", "trainer.max_steps=3"))
    assert [file.read_bytes() for file in files] == before
    torch.save(content, last)
    assert train(resolved(f"resume={folder.path}", "trainer.max_steps=3"))["step"] == 3
    assert folder.read_config()["trainer"]["max_steps"] == 3


def test_a_trained_run_is_opened_with_one_read_of_its_weights(settings, tmp_path, monkeypatch):
    train(resolved(*settings))
    folder = only_run(tmp_path)
    reads = counting(monkeypatch, torch, "load")
    assert open_run(folder.path, "cpu", "32-true").model.config.layers == 2
    assert len(reads) == 1


def test_a_run_saved_under_earlier_names_of_keys_is_the_same_run(settings, tmp_path):
    first = train(resolved(*settings))
    folder = only_run(tmp_path)
    config = folder.read_config()
    config["model"]["hidden"] = config["model"].pop("mlp_width")
    folder.config_file.write_text(yaml.safe_dump(config))
    assert train(resolved(f"resume={folder.path}")) == first, "nothing is left to do"
    assert train(resolved(f"resume={folder.path}", "trainer.max_steps=3"))["step"] == 3
    assert folder.read_config()["model"]["mlp_width"] == config["model"]["hidden"]
    log = folder.log_file.read_text()
    assert "trainer.max_steps=3, was 2" in log and "hidden" not in log and "mlp_width" not in log

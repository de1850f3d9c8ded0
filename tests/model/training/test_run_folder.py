import json
import logging
import math
import re
import shlex

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from model.training.run_folder import (
    RunFolder,
    RunFolderError,
    config_hash,
    find_checkpoint,
    new_run_path,
    resume_command,
    write_atomically,
)


def test_create_and_open(tmp_path):
    config = {"name": "probe", "model": {"width": 8, "betas": [0.9, 0.95]}, "resume": None, "text": "naïve: 1"}
    folder = RunFolder.create(new_run_path(tmp_path, "sweep/probe"), config)
    assert re.fullmatch(r"\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d_\d{6}", folder.path.name)
    assert folder.path.parent == tmp_path / "sweep" / "probe"
    assert RunFolder.open(folder.path).read_config() == config
    assert folder.checkpoints.is_dir()


def test_two_jobs_of_the_same_second_do_not_share_a_folder(tmp_path):
    assert len({new_run_path(tmp_path, "job") for _ in range(20)}) == 20


@pytest.mark.parametrize("name", ["a=b", "", "../up=1", "a b", "/root"])
def test_names_that_cannot_be_folders(tmp_path, name):
    with pytest.raises(RunFolderError, match="name="):
        new_run_path(tmp_path, name)


def test_a_run_is_not_overwritten(tmp_path):
    RunFolder.create(tmp_path / "run", {})
    with pytest.raises(RunFolderError, match=r"already holds a run; continue it with: python train.py .*resume="):
        RunFolder.create(tmp_path / "run", {})


def test_open_says_what_is_wrong(tmp_path):
    with pytest.raises(RunFolderError, match="no such run folder"):
        RunFolder.open(tmp_path / "nowhere")
    with pytest.raises(RunFolderError, match=r"is not a run folder: it holds no config\.yaml$"):
        RunFolder.open(tmp_path)
    (tmp_path / "config.json").touch()
    with pytest.raises(RunFolderError, match=f"; a model in Hugging Face's format is hf:{tmp_path}$"):
        RunFolder.open(tmp_path)


def test_find_checkpoint(tmp_path):
    folder = RunFolder.create(tmp_path / "run", {})
    last, best = folder.checkpoints / "last.ckpt", folder.checkpoints / "best.ckpt"
    with pytest.raises(RunFolderError, match="without a checkpoint"):
        find_checkpoint(folder.path)
    last.touch()
    assert find_checkpoint(folder.path) == last
    with pytest.raises(RunFolderError, match=r"no checkpoints/best\.ckpt"):
        find_checkpoint(folder.path / "best")
    best.touch()
    assert find_checkpoint(folder.path) == best
    assert find_checkpoint(folder.path, prefer="last") == last
    assert find_checkpoint(folder.path / "last") == last
    assert find_checkpoint(str(best)) == best
    for missing in (tmp_path / "none", tmp_path / "none.ckpt", tmp_path / "nowhere" / "best"):
        with pytest.raises(RunFolderError, match=r"no checkpoint at|no such run folder"):
            find_checkpoint(missing)


def test_summary_is_valid_json_and_grows(tmp_path):
    folder = RunFolder.create(tmp_path, {})
    folder.write_summary(state="running", seed=1)
    folder.write_summary(state="finished", loss=math.nan, nested={"values": [math.inf, 1.5]})
    text = folder.summary_file.read_text()
    assert "NaN" not in text and "Infinity" not in text
    assert json.loads(text) == {
        "state": "finished",
        "seed": 1,
        "loss": None,
        "nested": {"values": [None, 1.5]},
    }
    assert [path.name for path in tmp_path.iterdir() if "partial" in path.name] == []


def test_an_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch):
    file = tmp_path / "summary.json"
    write_atomically(file, "old")
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_atomically(file, "new")
    assert file.read_text() == "old"


def test_log_goes_to_the_file_while_inside(tmp_path):
    folder = RunFolder.create(tmp_path, {})
    before = list(logging.getLogger().handlers)
    with folder.logging_to_file():
        logging.getLogger("probe").info("inside")
    logging.getLogger("probe").warning("outside")
    assert "inside" in folder.log_file.read_text() and "outside" not in folder.log_file.read_text()
    assert logging.getLogger().handlers == before


def test_config_hash_ignores_what_only_names_the_run():
    config = {"name": "a", "resume": None, "seed": 1, "model": {"width": 8}}
    assert config_hash(config) == config_hash(config | {"name": "b", "resume": "x", "outputs": "c"})
    assert config_hash(config) != config_hash(config | {"seed": 2})


@pytest.mark.parametrize("name", ["run", "two words", "it's (2), {a: [b]}", "quote\\'s \\", "Übung", "$HOME; #~"])
def test_the_command_that_resumes_a_run_survives_shell_and_hydra(tmp_path, name):
    _, script, override = shlex.split(resume_command(tmp_path / name))
    assert script == "train.py"
    (parsed,) = OverridesParser.create().parse_overrides([override])
    assert (parsed.key_or_group, parsed.value()) == ("resume", str(tmp_path / name))

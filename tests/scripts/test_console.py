"""What every command shares."""

import errno
import io
import logging
import os
import re
import shutil
import signal

import pytest
from omegaconf import OmegaConf

from configs.checks import check_evaluate, check_generate
from configs.errors import ConfigError
from configs.resolve import with_later_keys
from model.training.checkpoints import CheckpointError, Checkpoints
from model.training.run_folder import RunFolder
from scripts import console
from tests.commands import compose, resolved, run
from tests.scripts.runs import SMALL, make_run, write_books
from train import train


def test_a_run_from_before_a_key_of_the_evaluation_can_go_on():
    """It keeps its own settings, and gets the default of what it does not know."""
    saved = {
        "evaluation": {"split": "validation", "protocol": {"name": "whole"}},
        "seed": 3,
        "trainer": {"max_steps": 7},
    }
    composed = {
        "evaluation": {"split": "test", "protocol": {"name": "sliding", "window": None}, "by_context": []},
        "seed": 1,
        "new": 5,
        "preflight": "warn",
        "trainer": {"max_steps": 420, "max_seconds": None, "on_nan": "stop", "max_skipped_steps": 10, "later": 2},
    }
    assert with_later_keys(saved, composed) == {
        "evaluation": {"split": "validation", "protocol": {"name": "whole", "window": None}, "by_context": []},
        "seed": 3,
        "preflight": "warn",
        "trainer": {"max_steps": 7, "max_seconds": None, "on_nan": "stop", "max_skipped_steps": 10},
    }


def test_a_run_that_began_from_anothers_weights_resumes_without_them(tmp_path):
    start = make_run(tmp_path, write_books(tmp_path / "books"))
    settings = (*SMALL, "data=files", f"data.path={tmp_path / 'books'}", f"data.cache={tmp_path / 'cache'}")
    short = ("trainer.max_steps=2", "trainer.validate_every=2", "evaluation=chunked", "evaluation.baselines=false")
    begun = train(resolved(*settings, *short, f"outputs={tmp_path}", "name=heir", f"init_from={start}"))
    (folder,) = (tmp_path / "heir").iterdir()
    with pytest.raises(ConfigError, match=f"init_from={start}: must be null with resume"):
        resolved(f"resume={folder}", f"init_from={start}")
    shutil.rmtree(start)  # what it began from is history
    again = train(resolved(f"resume={folder}"))
    assert (again["state"], again["step"], again["config_hash"]) == ("finished", 2, begun["config_hash"])


@pytest.mark.parametrize("argument", ["model=nan", "model=null", "attention=3", "attention=base"])
def test_a_choice_that_hydra_reads_as_a_value_is_one_line(argument, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["train.py", "seed=2", argument])
    monkeypatch.setattr("scripts.console._full_error", False)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    with pytest.raises(SystemExit) as end:
        console.run(lambda: compose("seed=2", argument))
    line = capsys.readouterr().err
    assert end.value.code == 2 and line.count("\n") == 1
    assert line.startswith(f"error: {argument}: must be one of ")


def test_another_value_error_is_no_users_mistake(monkeypatch):
    def fails():
        raise ValueError("a fault of ours")

    monkeypatch.setattr("sys.argv", ["train.py"])
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    monkeypatch.setattr("scripts.console._full_error", False)
    with pytest.raises(ValueError, match="a fault of ours"):
        console.run(fails)


def test_a_run_resumes_from_its_best_checkpoint(tmp_path):
    """The last one is truncated: refused in one line that names the best one, which is accepted."""
    books = write_books(tmp_path / "books")
    settings = (*SMALL, "data=files", f"data.path={books}", f"data.cache={tmp_path / 'cache'}", "name=run")
    short = ("trainer.max_steps=3", "trainer.validate_every=1", "evaluation=chunked", "evaluation.baselines=false")
    train(resolved(*settings, *short, f"outputs={tmp_path}"))
    (folder,) = (tmp_path / "run").iterdir()
    best, last = folder / "checkpoints/best.ckpt", folder / "checkpoints/last.ckpt"
    last.write_bytes(last.read_bytes()[:2000])
    with pytest.raises(CheckpointError, match=rf"last\.ckpt .* truncated; .*: {folder}/best, of step \d"):
        train(resolved(f"resume={folder}", "trainer.max_steps=4"))
    for means_best in (f"{folder}/best", best):
        summary = train(resolved(f"resume={means_best}"))
        assert (summary["state"], summary["step"]) == ("finished", 3)
    assert not (tmp_path / "run/best").exists()


def test_an_extended_run_that_is_stopped_keeps_its_new_end(tmp_path, monkeypatch):
    """The printed command has no max_steps: the run's own is what the resume before set."""
    books = write_books(tmp_path / "books")
    settings = (*SMALL, "data=files", f"data.path={books}", f"data.cache={tmp_path / 'cache'}", "name=run")
    short = ("trainer.max_steps=1", "evaluation=chunked", "evaluation.baselines=false", f"outputs={tmp_path}")
    train(resolved(*settings, *short))
    (folder,) = (tmp_path / "run").iterdir()
    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "on_train_batch_start", lambda *_: signal.raise_signal(signal.SIGTERM))
        stopped = train(resolved(f"resume={folder}", "trainer.max_steps=4"))
    assert (stopped["state"], stopped["step"]) == ("interrupted", 2)
    config = RunFolder.open(folder).read_config()
    assert (config["trainer"]["max_steps"], config["resume"]) == (4, None)
    assert "trainer.max_steps=4, was 1" in (folder / "train.log").read_text()
    finished = train(resolved(f"resume={folder}"))
    assert (finished["state"], finished["step"]) == ("finished", 4)


@pytest.mark.parametrize("key", ["resume", "init_from"])
def test_a_run_that_is_named_by_an_empty_text_is_refused(key):
    with pytest.raises(ConfigError, match=f"^{key}=[^\n]*: must be [^\n]*$"):
        resolved(f"{key}=")


@pytest.mark.parametrize(("command", "check"), [("evaluate", check_evaluate), ("generate", check_generate)])
def test_a_checkpoint_that_is_named_by_an_empty_text_is_refused(command, check):
    with pytest.raises(ConfigError, match=r"^checkpoint=[^\n]*: must be [^\n]*$"):
        check(compose("checkpoint=", config_name=command))


def test_a_run_resumes_on_other_devices_with_as_many_sequences_a_step(tmp_path):
    shared = ("data.batch_size=4", "trainer.devices=2", "trainer.strategy=ddp")
    run = make_run(tmp_path / "outputs", write_books(tmp_path / "books"), *shared)
    alone = f"resume={run}", "trainer.devices=1", "trainer.strategy=auto"
    assert resolved(*alone, "data.batch_size=8")["data"]["batch_size"] == 8
    with pytest.raises(ConfigError, match=r"^data\.batch_size=6: must make 8 sequences [^\n]* it makes 6$"):
        resolved(*alone, "data.batch_size=6")


def test_a_resumed_run_keeps_its_accumulation(tmp_path):
    run = make_run(tmp_path, write_books(tmp_path / "books"), "trainer.accumulate=2")
    with pytest.raises(ConfigError, match=r"trainer\.accumulate=3: must be 2") as error:
        resolved(f"resume={run}", "trainer.accumulate=3")
    assert "\n" not in str(error.value)
    assert resolved(f"resume={run}", "trainer.accumulate=2")["trainer"]["accumulate"] == 2


@pytest.fixture
def fails_in_a_line(tmp_path, monkeypatch, capsys):
    """Trains with these overrides, checks that the exit status is 2, and returns the error's only line."""
    books = write_books(tmp_path / "books")
    monkeypatch.setattr("scripts.console._full_error", False)
    monkeypatch.setattr("scripts.console.start_logging", lambda: None)
    settings = (*SMALL, "data=files", f"data.path={books}", f"data.cache={tmp_path / 'cache'}", "trainer.max_steps=2")

    def attempt(*overrides: str) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as end, console.user_errors():
            train(resolved(*settings, "name=run", *overrides))
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert end.value.code == 2 and "Traceback" not in line
        return line

    return attempt


def test_a_place_that_cannot_hold_a_run_is_one_line(tmp_path, fails_in_a_line):
    (tmp_path / "file").write_text("")
    assert str(tmp_path / "file/run") in fails_in_a_line(f"outputs={tmp_path / 'file'}")
    assert f"data.cache={tmp_path / 'file'}" in fails_in_a_line(f"data.cache={tmp_path / 'file'}")


def test_the_runs_tokenizer_is_written_whole_or_not_at_all(tmp_path, monkeypatch, fails_in_a_line):
    fails_in_a_line(f"outputs={tmp_path / 'books/train/00.txt'}")  # prepares the corpus

    def half(self, file):
        file.write_text("{")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("data.tokenizers.byte_level.ByteLevel.save", half)
    line = fails_in_a_line(f"outputs={tmp_path}")
    (folder,) = (tmp_path / "run").iterdir()
    assert str(folder / "tokenizer.json") in line and "bytes free" in line
    assert not [file for file in folder.iterdir() if file.name.startswith("tokenizer.json")]


def test_a_command_leaves_hydras_switch_as_it_was(monkeypatch):
    monkeypatch.setattr("sys.argv", ["train.py"])
    monkeypatch.delenv(console.FULL_ERROR, raising=False)
    during = []
    console.run(lambda: during.append(os.environ.get(console.FULL_ERROR)))
    assert during == ["1"] and console.FULL_ERROR not in os.environ


def test_progress_without_a_terminal_is_a_line_each_minute(monkeypatch, caplog, capsys):
    monkeypatch.setattr("scripts.console.SECONDS_BETWEEN_LINES", 0)
    monkeypatch.setattr(logging.getLogger(), "handlers", [caplog.handler])  # without that of an earlier command
    monkeypatch.setattr("time.monotonic", iter([0.0, 30.0, 4000.0]).__next__)
    with caplog.at_level("INFO"), console.progress_bar("books", 800) as advance:
        advance(200)
        advance(200)
    assert [record.getMessage() for record in caplog.records] == ["books: 25%  ETA 0:01:30", "books: 50%  ETA 1:06:40"]
    assert capsys.readouterr().err == ""


def test_log_lines_go_to_the_standard_error_of_their_time(monkeypatch):
    """rich replaces it while it shows a bar, so that lines appear above the bar."""
    logger = logging.Logger("test")
    monkeypatch.setattr("sys.stderr", earlier := io.StringIO())
    logger.addHandler(console._StandardError())
    logger.warning("an earlier line")
    earlier.close()
    monkeypatch.setattr("sys.stderr", shown := io.StringIO())
    logger.warning("a line")
    assert shown.getvalue() == "a line\n"


@pytest.mark.parametrize(
    ("command", "error"),
    [
        ("train.py data=files", "data.path: must be set: books/ or.*"),
        ("train.py data=files data.path=nowhere", "data.path=nowhere: must be a file or folder that exists, or a glob"),
        ("train.py attention.backend=cuda", "attention.backend=cuda: must be auto, .* or flash"),
        ("train.py resume=nowhere", "resume=nowhere: no checkpoint at nowhere: give a run folder, .*"),
        ("train.py init_from=nowhere", "init_from=nowhere: no checkpoint at nowhere: give a run folder, .*"),
        ("train.py -m sweep=patterns trainer.max_steps=abc", "trainer.max_steps=abc: must be an integer .*"),
        ("scripts/preflight.py data.batch_size=0", "data.batch_size=0: must be an integer >= 1"),
        (
            "scripts/evaluate.py checkpoint=nowhere",
            "checkpoint=nowhere: no checkpoint at nowhere: .*",
        ),
        (
            "scripts/generate.py checkpoint=nowhere",
            "checkpoint=nowhere: no checkpoint at nowhere: .*",
        ),
        ("scripts/probe.py checkpoint=nowhere", "checkpoint=nowhere: no checkpoint at nowhere: .*"),
        (
            "scripts/export.py checkpoint=nowhere output=there",
            "checkpoint=nowhere: no checkpoint at nowhere: .*",
        ),
        ("scripts/show_pattern.py length=0", "length=0: must be an integer >= 1"),
    ],
)
def test_what_needs_no_model_is_refused_before_pytorch_is_imported(command, error):
    result = run("-X", "importtime", *command.split(), check=False)
    lines = [line for line in result.stderr.splitlines() if not line.startswith("import time:")]
    assert result.returncode == 2 and re.fullmatch(f"error: {error}", "\n".join(lines)), lines
    imported = re.findall(r"\| +([\w.]+)$", result.stderr, re.MULTILINE)
    assert "omegaconf" in imported and not {"torch", "lightning", "datasets", "transformers"} & set(imported)


def test_a_librarys_warning_is_written_once(monkeypatch):
    """huggingface_hub and datasets have a handler of their own, and also pass their messages to ours."""
    shown = io.StringIO()
    monkeypatch.setattr("sys.stderr", shown)
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    console.start_logging()
    noisy, quiet = logging.getLogger("noisy_library"), logging.getLogger("quiet_library")
    noisy.addHandler(logging.StreamHandler(shown))
    noisy.setLevel(logging.WARNING)
    for logger in (noisy, quiet, logging.getLogger("farsight")):
        logger.warning("from %s", logger.name)
        logger.info("and what is only for %s", logger.name)
    lines = ["from noisy_library", "from quiet_library", "from farsight", "and what is only for farsight"]
    assert shown.getvalue().splitlines() == lines


@pytest.mark.parametrize("name", ["train", "evaluate", "generate", "export", "probe", "preflight", "show_pattern"])
def test_help_begins_with_what_the_command_does(name):
    header = OmegaConf.load(console.CONFIGS / f"{name}.yaml").hydra.help.header
    assert re.match(r"[A-Z][a-z]+s .*\. ?.*docs/", header, re.DOTALL) and "configs/ explain each key" in header

"""A sweep launched, and launched again: what runs, what does not, what the manifest says."""

import errno
import importlib.metadata
import json
import types
from pathlib import Path

import pytest
import torch
import yaml
from hydra.core.utils import JobStatus
from hydra.errors import MissingConfigException

from configs.errors import ConfigError
from scripts.reporting.manifest import read_manifest
from scripts.sweeping.composer import Composer
from scripts.sweeping.locks import changing_job
from tests.scripts.sweeping.conftest import at_message, jobs_of, run_by_another, run_sweep, states
from train import is_sweep

PAIR = ("sweep=patterns", "attention=window")


def fails(error: BaseException):
    def happen(*_):
        raise error

    return happen


def test_a_sweep_of_real_jobs(tmp_path, small, reports, capsys):
    assert run_sweep(tmp_path, *PAIR, *small) == 0
    folder = tmp_path / "patterns"
    manifest = read_manifest(folder)
    assert (manifest.sweep, manifest.match, manifest.budget) == ("patterns", "tokens", {"tokens": 6 * 64})
    assert manifest.command.startswith("python train.py -m sweep=patterns attention=window model.width=32")
    assert manifest.versions["torch"] == importlib.metadata.version("torch") and manifest.device
    dense, window = manifest.jobs
    assert (dense.label, dense.baseline, dense.seed) == ("dense", True, 1)
    assert (window.label, window.baseline, window.seed) == ("window", False, 1)
    for job in manifest.jobs:
        place = folder / job.folder
        for name in (
            "config.yaml",
            "summary.json",
            "evaluation.json",
            "metrics.csv",
            "train.log",
            "checkpoints/last.ckpt",
        ):
            assert (place / name).stat().st_size > 0, name
        summary = json.loads((place / "summary.json").read_text())
        assert summary["config_hash"] == job.hash == place.name and summary["state"] == "finished"
        assert job.state == "done" and job.seconds > 0 and job.started <= job.ended
        assert job.command.split()[:2] == ["python", "train.py"] and "sweep=" not in job.command
        config = yaml.safe_load((place / "config.yaml").read_text())
        assert config["attention"]["name"] == job.label
    assert reports == [["done", "waiting"], ["done", "done"], ["done", "done"]]
    screen = capsys.readouterr().err
    assert "job 1/2 dense seed=1: starts" in screen and "job 2/2 window seed=1: done after" in screen
    assert "2 of 2 jobs done" in screen
    assert not (tmp_path / "multirun").exists()

    before = (folder / dense.folder / "summary.json").stat().st_mtime_ns
    assert run_sweep(tmp_path, *PAIR, *small) == 0
    assert "job 1/2 dense seed=1: already done" in capsys.readouterr().err
    assert (folder / dense.folder / "summary.json").stat().st_mtime_ns == before


def test_more_of_the_same_sweep_runs_what_is_missing(tmp_path, small, quick, reports, monkeypatch, capsys):
    assert run_sweep(tmp_path, *PAIR, *small) == 0
    assert run_sweep(tmp_path, *PAIR, "seed=1,2", *small) == 0
    assert list(states(tmp_path / "patterns")) == ["dense seed=1", "window seed=1", "dense seed=2", "window seed=2"]
    assert capsys.readouterr().err.count("starts") == 4
    monkeypatch.setattr(Composer, "launcher", lambda *_: pytest.fail("there is nothing to launch"))
    assert run_sweep(tmp_path, *PAIR, "seed=1,2", *small) == 0


def test_a_job_that_fails_stops_no_other(tmp_path, small, quick, reports, capsys):
    quick["dense"] = fails(RuntimeError("boom\nsecond line"))
    assert run_sweep(tmp_path, *PAIR, "seed=1,2", *small) == 1
    folder = tmp_path / "patterns"
    assert list(states(folder).values()) == ["failed", "failed", "done", "done"]
    job = read_manifest(folder).jobs[0]
    assert job.exit_reason == "RuntimeError: boom"
    assert "Traceback" in job.traceback and "second line" in job.traceback
    assert job.traceback in (folder / job.folder / "train.log").read_text()
    screen = capsys.readouterr().err
    assert "job 1/4 dense seed=1: failed after 0 s: RuntimeError: boom" in screen
    assert "2 of 4 jobs done" in screen and "Traceback" not in screen


def test_what_failed_runs_again_unless_it_shall_not(tmp_path, small, quick, reports, capsys):
    quick["window"] = fails(ConfigError("attention.patterns.local.width=0: must be >= 1"))
    assert run_sweep(tmp_path, *PAIR, *small) == 1
    job = read_manifest(tmp_path / "patterns").jobs[1]
    assert (job.exit_reason, job.traceback) == ("attention.patterns.local.width=0: must be >= 1", None)
    assert "ConfigError" in (tmp_path / "patterns" / job.folder / "train.log").read_text()
    del quick["window"]
    assert run_sweep(tmp_path, *PAIR, *small, "sweep.retry_failed=false") == 1
    assert states(tmp_path / "patterns")["window seed=1"] == "failed"
    assert "job 2/2 window seed=1: failed, and sweep.retry_failed=false" in capsys.readouterr().err
    assert run_sweep(tmp_path, *PAIR, *small) == 0
    job = read_manifest(tmp_path / "patterns").jobs[1]
    assert (job.state, job.exit_reason, job.traceback) == ("done", None, None)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError()])
def test_a_job_without_memory_says_so(tmp_path, small, quick, reports, error):
    quick["dense"] = fails(error)
    assert run_sweep(tmp_path, *PAIR, *small) == 1
    assert list(states(tmp_path / "patterns").values()) == ["out of memory", "done"]


def test_a_job_that_ends_the_process_is_one_that_failed(tmp_path, small, quick, reports):
    quick["dense"] = fails(SystemExit(3))
    assert run_sweep(tmp_path, *PAIR, *small) == 1
    assert list(states(tmp_path / "patterns").values()) == ["failed", "done"]


def test_a_real_job_that_cannot_be_says_why(tmp_path, small, reports, capsys):
    arguments = ["attention.patterns.local.width=0", "sweep.baseline=null"]
    assert run_sweep(tmp_path, *PAIR, *small, *arguments) == 1
    (job,) = read_manifest(tmp_path / "patterns").jobs
    assert job.state == "failed" and job.exit_reason.startswith("attention.patterns.local.width=0: must be")
    assert "build_pattern" in (tmp_path / "patterns" / job.folder / "train.log").read_text()


def test_a_changed_config_is_a_new_job(tmp_path, small, quick, reports):
    assert run_sweep(tmp_path, *PAIR, *small) == 0
    assert run_sweep(tmp_path, *PAIR, *small, "optimizer.learning_rate=0.5") == 0
    names = list(states(tmp_path / "patterns"))
    assert names == [
        "dense seed=1",
        "window seed=1",
        "dense learning_rate=0.5 seed=1",
        "window learning_rate=0.5 seed=1",
    ]
    assert len({job.folder for job in read_manifest(tmp_path / "patterns").jobs}) == 4


def test_another_budget_is_another_sweep(tmp_path, small, quick, reports, capsys):
    assert run_sweep(tmp_path, *PAIR, *small) == 0
    with pytest.raises(SystemExit) as stop:
        run_sweep(tmp_path, *PAIR, *small, "trainer.max_steps=7")
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert stop.value.code == 2
    assert "sweep.match=tokens sweep.tokens=384, and this sweep has sweep.match=tokens sweep.tokens=448" in line
    assert run_sweep(tmp_path, *PAIR, *small, "trainer.max_steps=7", "sweep.name=longer") == 0
    assert len(states(tmp_path / "longer")) == len(states(tmp_path / "patterns")) == 2


@pytest.mark.parametrize(("ends", "trains", "status"), [("done", 0, 0), ("interrupted", 1, 0), ("failed", 0, 1)])
def test_a_sweep_waits_for_jobs_that_another_process_runs_and_runs_what_it_does_not_finish(
    tmp_path, small, quick, reports, monkeypatch, ends, trains, status
):
    trained = []
    quick |= {"window": fails(RuntimeError()), "strided": fails(RuntimeError())}
    three = ("sweep=patterns", "attention=window,strided", *small)
    run_sweep(tmp_path, *three)
    folder = tmp_path / "patterns"
    quick |= {label: lambda label=label: trained.append(label) for label in ("window", "strided")}

    def release() -> None:
        assert trained == ["strided"], "what no other process runs comes first"
        may_end.set()

    with run_by_another(folder, read_manifest(folder).jobs[1].hash, ends) as may_end:
        told = at_message("waits for job 2/3 window seed=1, which runs in another process", release)
        monkeypatch.setattr("scripts.sweeping.sweep.log.info", told)
        assert run_sweep(tmp_path, *three) == status
    assert trained == ["strided", *["window"] * trains]
    assert states(folder)["window seed=1"] == ("failed" if ends == "failed" else "done")


def test_ctrl_c_stops_the_sweep_and_it_resumes(tmp_path, small, quick, reports, capsys):
    quick["window"] = fails(KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        run_sweep(tmp_path, "sweep=patterns", "attention=window,strided", *small)
    assert list(states(tmp_path / "patterns").values()) == ["done", "interrupted", "waiting"]
    assert reports[-1] == ["done", "interrupted", "waiting"]
    del quick["window"]
    assert run_sweep(tmp_path, "sweep=patterns", "attention=window,strided", *small) == 0


class Crashing:
    """A launcher that dies with its second job, as joblib does when a worker is killed."""

    def __init__(self, folder, worker):
        self.folder, self.worker = folder, worker

    def launch(self, overrides, initial_job_idx):
        for number, lines in enumerate(overrides, 1):
            (job,) = [job for job in read_manifest(self.folder).jobs if job.overrides == lines]
            with changing_job(self.folder, job.hash) as noted:
                noted.start()
                if number != 2:
                    noted.end("done", 1.0)
            if number == 2:
                raise OSError("a worker was killed")
        return [types.SimpleNamespace(status=JobStatus.COMPLETED) for _ in overrides]


def test_a_launcher_that_dies_costs_the_jobs_that_it_had_begun(tmp_path, small, reports, monkeypatch, capsys):
    monkeypatch.setattr(Composer, "launcher", lambda self, folder, worker: Crashing(folder, worker))
    assert run_sweep(tmp_path, "sweep=patterns", "attention=window,strided", *small) == 1
    assert list(states(tmp_path / "patterns").values()) == ["done", "interrupted", "done"]
    assert read_manifest(tmp_path / "patterns").jobs[1].exit_reason == "its process ended: OSError"
    assert "the launcher failed: OSError: a worker was killed" in capsys.readouterr().err


def test_a_launcher_that_begins_nothing_is_an_error(tmp_path, small, reports, monkeypatch):
    launcher = types.SimpleNamespace(launch=lambda *_: fails(OSError("no cluster"))())
    monkeypatch.setattr(Composer, "launcher", lambda *_: launcher)
    with pytest.raises(OSError, match="no cluster"):
        run_sweep(tmp_path, *PAIR, *small)
    assert list(states(tmp_path / "patterns").values()) == ["waiting", "waiting"]


def error_line(capsys) -> str:
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    return line


def test_a_full_disk_costs_a_line_and_nothing_that_was_written(tmp_path, small, quick, reports, monkeypatch, capsys):
    quick["window"] = lambda: monkeypatch.setattr("model.training.run_folder.os.fsync", full)

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(SystemExit) as stop:
        run_sweep(tmp_path, *PAIR, *small)
    assert stop.value.code == 2
    line = error_line(capsys)
    assert f"{tmp_path / 'patterns'}: No space left on device; " in line
    assert "bytes needed" in line and "bytes free" in line
    assert states(tmp_path / "patterns") == {"dense seed=1": "done", "window seed=1": "running"}
    assert not list(tmp_path.rglob("*.partial"))
    monkeypatch.undo()


def test_a_place_that_cannot_be_written_is_one_line(tmp_path, small, capsys):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit) as stop:
        run_sweep(tmp_path / "file", *PAIR, *small)
    assert stop.value.code == 2 and f"{tmp_path / 'file' / 'patterns'}: Not a directory" in error_line(capsys)


def test_a_launcher_that_is_not_installed_says_how_it_would_be(monkeypatch):
    with Composer(["-m", "sweep=patterns", "hydra/launcher=joblib"]) as composer:

        def missing(lines, mode):
            raise MissingConfigException("", missing_cfg_file="hydra/launcher/joblib", options=["basic"])

        monkeypatch.setattr(composer, "_load", missing)
        monkeypatch.setattr(composer, "choices", lambda _: ["basic"])
        with pytest.raises(ConfigError, match=r"hydra/launcher=joblib: must be one of basic; .*farsight\[sweep\]"):
            composer.master  # noqa: B018


def test_a_job_that_cannot_even_begin_says_why(tmp_path, small, reports, monkeypatch, capsys):
    monkeypatch.setattr("configs.resolve.resolve", fails(ValueError("no such thing")))
    monkeypatch.setattr("scripts.sweeping.worker.start_logging", lambda: None)
    assert run_sweep(tmp_path, *PAIR, *small) == 1
    assert set(states(tmp_path / "patterns").values()) == {"failed"}
    assert "job 1/2 dense seed=1: failed: ValueError: no such thing" in capsys.readouterr().err


def test_wandb_groups_the_runs_of_a_sweep():
    for arguments, group in ((["logger=wandb"], "patterns"), (["logger=wandb", "logger.group=mine"], "mine")):
        jobs = jobs_of(*PAIR, *arguments)
        assert [job.config["logger"]["group"] for job in jobs] == [group, group]


def test_a_report_that_fails_costs_a_line(tmp_path, small, quick, monkeypatch, capsys):
    def write_report(folders):
        raise ValueError("no figure\nat all")

    monkeypatch.setattr("scripts.reporting.write.write_report", write_report)
    assert run_sweep(tmp_path, *PAIR, *small) == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("no report")]
    assert lines == [f"no report of {tmp_path / 'patterns'}: ValueError: no figure"] * 3


def test_a_report_is_written_after_every_job(tmp_path, small, quick, monkeypatch):
    seen = []

    def write_report(folders: list[Path]) -> None:
        seen.append(([str(folder) for folder in folders], list(states(folders[0]).values())))

    monkeypatch.setattr("scripts.reporting.write.write_report", write_report)
    assert run_sweep(tmp_path, *PAIR, *small) == 0
    place = [str(tmp_path / "patterns")]
    assert seen == [(place, ["done", "waiting"]), (place, ["done", "done"]), (place, ["done", "done"])]


def test_what_is_a_sweep():
    assert is_sweep(["-m", "sweep=patterns"]) and is_sweep(["sweep=x", "--multirun"])
    assert not is_sweep(["-m", "attention=dense,window"]) and not is_sweep(["sweep=patterns"])

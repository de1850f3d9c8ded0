"""Jobs in other processes: joblib's, submitit's, their own, several ranks; and a search."""

import os
import sys
import types

import pytest

from configs.evaluation import limit_of
from data.excerpts import default_limit
from model.training.run_folder import RunFolder
from scripts.console import ROOT
from scripts.reporting.manifest import read_manifest
from scripts.sweeping import own_process
from scripts.sweeping.locks import changing_job
from scripts.sweeping.search import Interval, choices, space_of
from tests.scripts.sweeping.conftest import at_message, run_by_another, run_sweep, states, without_report

ONE = ("sweep=patterns", "sweep.baseline=null", "attention=window")


@pytest.fixture(autouse=True)
def one_thread_each(monkeypatch):
    for name in ("OMP_NUM_THREADS", "PYTHONPATH"):  # set here, so that monkeypatch puts back what the launch changes
        monkeypatch.setenv(name, os.environ.get(name, "") if name == "PYTHONPATH" else "1")


@pytest.mark.slow  # two processes of joblib
def test_joblib_runs_jobs_side_by_side(tmp_path, small, reports):
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    without_report(tmp_path)
    assert run_sweep(tmp_path, *ONE, "seed=1,2", *small, "hydra/launcher=joblib", "hydra.launcher.n_jobs=2") == 0
    manifest = read_manifest(tmp_path / "patterns")
    first, second = manifest.jobs
    assert first.state == second.state == "done"
    assert second.started <= first.ended and first.started <= second.ended
    assert "hydra" not in first.command


@pytest.mark.slow  # a process of submitit, which looks for its result once in a while
def test_submitit_runs_jobs_elsewhere(tmp_path, small, reports):
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    assert run_sweep(tmp_path, *ONE, *small, "hydra/launcher=submitit_local") == 0
    assert states(tmp_path / "patterns") == {"window seed=1": "done"}
    assert (tmp_path / "patterns" / ".submitit").is_dir()
    assert "window" in (tmp_path / "patterns" / "report" / "report.md").read_text(), "the job's process has written it"


@pytest.mark.slow  # two ranks, in two processes
def test_a_job_of_two_ranks_launches_no_second_sweep(tmp_path, small, reports):
    without_report(tmp_path)
    assert run_sweep(tmp_path, *ONE, *small, "trainer.devices=2", "trainer.strategy=ddp") == 0
    manifest = read_manifest(tmp_path / "patterns")
    (job,) = manifest.jobs
    assert job.state == "done" and manifest.budget == {"tokens": 6 * 64 * 2}
    assert [path.name for path in tmp_path.iterdir()] == ["patterns"]
    log = (tmp_path / "patterns" / job.folder / "train.log").read_text()
    assert log.count("run folder:") == 1 and "step 6/6" in log


def test_a_job_of_its_own_is_the_jobs_command_alone(tmp_path, small, reports, monkeypatch):
    """What Lightning runs again for every further rank: never `-m`, never the sweep."""
    started = []

    class Process:
        def __init__(self, command, env, process_group):
            started.append((command, env))

        def wait(self):
            return -9

    monkeypatch.setattr(own_process, "subprocess", types.SimpleNamespace(Popen=Process))
    assert run_sweep(tmp_path, *ONE, *small, "sweep.isolate=true") == 1
    (job,) = read_manifest(tmp_path / "patterns").jobs
    ((command, environment),) = started
    assert command == [sys.executable, str(ROOT / "train.py"), *job.overrides]
    assert environment["FARSIGHT_RUN_FOLDER"] == str(tmp_path / "patterns" / job.hash)
    assert job.state == "failed"
    assert job.exit_reason == "its process ended with SIGKILL, perhaps because the system ran out of memory"


@pytest.mark.parametrize("ntasks", ["1", "4"])
def test_on_a_cluster_the_ranks_are_there_already(monkeypatch, ntasks):
    monkeypatch.setenv("SLURM_NTASKS", ntasks)
    assert own_process.starts_ranks({"devices": 4}) == (ntasks == "1")
    assert not own_process.starts_ranks({"devices": 1})


# The search


def test_a_search_goes_on_where_it_stopped(tmp_path, small, quick, reports, capsys):
    pytest.importorskip("optuna")
    arguments = ("sweep=search", "attention=window", *small, "attention.patterns.local.width=16,32")
    assert run_sweep(tmp_path, *arguments, "sweep.search.trials=3") == 0
    folder = tmp_path / "search"
    first = read_manifest(folder)
    assert [job.baseline for job in first.jobs] == [True, False, False, False]
    rates = [line.partition("=")[2] for job in first.jobs for line in job.overrides if "learning_rate" in line]
    assert len(set(rates)) == 3 and all(0.001 <= float(rate) <= 0.02 for rate in rates)
    assert "best: bits_per_byte=1.0000 with" in capsys.readouterr().err

    assert run_sweep(tmp_path, *arguments, "sweep.search.trials=5") == 0
    again = read_manifest(folder)
    assert [job.hash for job in again.jobs[:4]] == [job.hash for job in first.jobs] and len(again.jobs) == 6
    assert capsys.readouterr().err.count("already done") == 4


def test_a_search_waits_for_a_trial_that_another_process_runs(tmp_path, small, quick, reports, monkeypatch):
    """Its next proposal depends on the result."""
    pytest.importorskip("optuna")
    arguments = ("sweep=search", "sweep.baseline=null", *small, "optimizer.learning_rate=0.01,0.02")
    assert run_sweep(tmp_path, *arguments, "sweep.search.trials=3") == 0
    folder = tmp_path / "search"
    expected = [job.hash for job in read_manifest(folder).jobs]
    with run_by_another(folder, expected[0], "done") as may_end:
        told = at_message("which runs in another process", may_end.set)
        monkeypatch.setattr("scripts.sweeping.sweep.log.info", told)
        assert run_sweep(tmp_path, *arguments, "sweep.search.trials=3") == 0
    assert [job.hash for job in read_manifest(folder).jobs] == expected


@pytest.mark.parametrize("lengths", ["32,65536", "int(interval(32,65536))"])
def test_the_trials_of_a_search_and_the_baseline_are_scored_on_the_same_text(tmp_path, small, quick, reports, lengths):
    pytest.importorskip("optuna")
    own = [each for each in small if "sequence_length" not in each]
    searched = (f"data.sequence_length={lengths}", "optimizer.learning_rate=0.01,0.02", "sweep.search.trials=4")
    assert run_sweep(tmp_path, "sweep=search", "attention=window", *own, *searched, "sweep.match=null") == 0
    folder, limits, found = tmp_path / "search", set(), set()
    for job in read_manifest(folder).jobs:
        config = RunFolder(folder / job.folder).read_config()
        found.add(config["data"]["sequence_length"])
        limits.add(limit_of(config["evaluation"], config["data"]["sequence_length"]))
    assert limits == {default_limit(65536)} and min(found) < 8192


def test_a_search_is_told_what_failed(tmp_path, small, quick, reports):
    pytest.importorskip("optuna")
    tries = iter([RuntimeError("boom")])

    def fail_once():
        for error in tries:
            raise error

    quick["window"] = fail_once
    arguments = ("sweep=search", "sweep.baseline=null", *small, "optimizer.learning_rate=0.01", "sweep.search.trials=3")
    assert run_sweep(tmp_path, *arguments, "attention.patterns.local.width=16,32,64,128,256,512,1024") == 1
    found = list(states(tmp_path / "search").values())
    assert found.count("failed") == 1 and found.count("done") >= 1


def test_a_search_over_seeds_is_refused(tmp_path, small, capsys):
    pytest.importorskip("optuna")
    with pytest.raises(SystemExit):
        run_sweep(tmp_path, "sweep=search", *small, "seed=1,2")
    assert "seed=1,2: must be one seed in a search" in capsys.readouterr().err


def test_what_a_search_searches():
    from scripts.sweeping.composer import Composer

    with Composer(
        ["-m", "sweep=search", "a=1,2", "b=interval(0.1,1)", "c=tag(log,interval(1,100))", "d=3"]
    ) as composer:
        space, fixed = space_of({"d": [1], "e": "range(1,4)", "f": [True, None]}, composer.own, composer.parse)
        assert space == {
            "a": ["1", "2"],
            "b": Interval(0.1, 1),
            "c": Interval(1, 100, log=True),
            "e": ["1", "2", "3"],
            "f": ["true", "null"],
        }
        assert fixed == {"d": "3"}
        assert choices(composer.parse(["x=5"])[0]) == ["5"]


def test_a_manifest_of_a_search_has_no_job_twice(tmp_path, small, quick, reports):
    pytest.importorskip("optuna")
    arguments = ("sweep=search", "sweep.baseline=null", *small, "optimizer.learning_rate=0.01", "sweep.search.trials=6")
    assert run_sweep(tmp_path, *arguments, "attention.patterns.local.width=16,32") == 0
    manifest = read_manifest(tmp_path / "search")
    assert len({job.hash for job in manifest.jobs}) == len(manifest.jobs) <= 2
    with changing_job(tmp_path / "search", manifest.jobs[0].hash) as job:
        assert job.state == "done"

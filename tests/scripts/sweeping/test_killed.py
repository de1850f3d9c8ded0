"""Sweeps that end in the middle of a job, as processes do: killed, stopped, or two at once."""

import signal

import pytest
import torch

from scripts.reporting.manifest import MANIFEST_FILE, read_manifest
from tests.commands import read_log
from tests.scripts.sweeping.conftest import run_sweep, start, states, table, wait_for, without_report

JOBS = ("sweep=patterns", "attention=window", "attention.patterns.local.width=16", "trainer.max_steps=40",
        "trainer.validate_every=40", "trainer.save_every=4")  # fmt: skip


@pytest.mark.slow  # two processes, which import everything, and three sweeps of two jobs
def test_a_sweep_that_was_killed_and_stopped_ends_with_the_same_table(tmp_path, small, reports, capsys):
    jobs = (*JOBS, *(each for each in small if not each.startswith("trainer.") or "log_every" in each))
    assert run_sweep(tmp_path / "undisturbed", *jobs) == 0
    folder = tmp_path / "disturbed" / "patterns"

    without_report(tmp_path / "disturbed")
    with start(tmp_path / "disturbed", *jobs) as process:
        read_log(process, "step 9/40")
        process.send_signal(signal.SIGKILL)
    assert list(states(folder).values()) == ["running", "waiting"]  # nobody was left to write anything
    first = read_manifest(folder).jobs[0]
    assert 8 <= torch.load(folder / first.folder / "checkpoints/last.ckpt", weights_only=True)["global_step"] < 40

    with start(tmp_path / "disturbed", *jobs) as process:
        read_log(process, "job 1/2 dense seed=1: resumes from its last checkpoint")
        read_log(process, "job 2/2 window seed=1: starts")
        read_log(process, "step 5/40")
        process.send_signal(signal.SIGINT)
        process.stderr.read()
    assert process.returncode == 130
    assert list(states(folder).values()) == ["done", "interrupted"]
    assert read_manifest(folder).jobs[1].exit_reason.startswith("stopped at step ")

    capsys.readouterr()
    done = read_manifest(folder).jobs[0]
    assert run_sweep(tmp_path / "disturbed", *jobs) == 0
    assert read_manifest(folder).jobs[0] == done, "what is done is left alone"
    assert "job 2/2 window seed=1: resumes from its last checkpoint" in capsys.readouterr().err
    undisturbed = tmp_path / "undisturbed" / "patterns"
    assert table(folder) == table(undisturbed)
    for one, other in zip(read_manifest(folder).jobs, read_manifest(undisturbed).jobs, strict=True):
        assert one.hash == other.hash
        log = (folder / one.folder / "train.log").read_text()
        assert log.count("run folder:") == 2, "begun, and gone on with once"
        assert log.count("step 1/40 ") == log.count("step 40/40  loss") == 1, "gone on with, and not begun again"
        weights = [
            torch.load(place / one.folder / "checkpoints/last.ckpt", weights_only=True)["state_dict"]
            for place in (folder, undisturbed)
        ]
        assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])


def test_a_killed_job_without_a_checkpoint_starts_anew(tmp_path, small, reports):
    jobs = ("sweep=patterns", "sweep.baseline=null", "attention=window", *small)
    assert run_sweep(tmp_path / "undisturbed", *jobs) == 0
    assert run_sweep(tmp_path / "disturbed", *jobs) == 0
    folder = tmp_path / "disturbed" / "patterns"
    manifest = (folder / MANIFEST_FILE).read_text().replace('"done"', '"running"')  # as SIGKILL leaves it
    (folder / MANIFEST_FILE).write_text(manifest)
    job = read_manifest(folder).jobs[0]
    for file in (folder / job.folder / "checkpoints").iterdir():
        file.unlink()
    assert run_sweep(tmp_path / "disturbed", *jobs) == 0
    assert table(folder) == table(tmp_path / "undisturbed" / "patterns")
    assert len((folder / job.folder / "metrics.csv").read_text().splitlines()) == 1 + 6 + 2  # no row of the first try


def test_a_killed_job_that_began_from_anothers_weights_goes_on_from_its_own(tmp_path, small, reports, capsys):
    assert run_sweep(tmp_path, "sweep=patterns", "sweep.baseline=null", "attention=window", *small) == 0
    begun = next(tmp_path.glob("patterns/*/checkpoints/last.ckpt"))
    jobs = ("sweep=patterns", "sweep.name=heirs", "sweep.baseline=null", "attention=window", *small,
            f"init_from={begun}")  # fmt: skip
    assert run_sweep(tmp_path, *jobs) == 0
    folder = tmp_path / "heirs"
    before = table(folder)
    manifest = (folder / MANIFEST_FILE).read_text().replace('"done"', '"running"')  # as SIGKILL leaves it
    (folder / MANIFEST_FILE).write_text(manifest)
    begun.unlink()
    capsys.readouterr()
    assert run_sweep(tmp_path, *jobs) == 0
    assert "resumes from its last checkpoint" in capsys.readouterr().err
    assert table(folder) == before


@pytest.mark.slow  # a second process
def test_two_sweeps_at_once_share_the_jobs(tmp_path, small, reports):
    jobs = ("sweep=patterns", "attention=window", *small)
    folder = tmp_path / "patterns"
    without_report(tmp_path)
    with start(tmp_path, *jobs) as process:
        read_log(process, "job 1/2 dense seed=1: starts")
        ours = run_sweep(tmp_path, *jobs)
        process.stderr.read()
    wait_for(lambda: process.poll() is not None)
    assert set(states(folder).values()) == {"done"} and len(states(folder)) == 2
    assert ours == process.returncode == 0, "the one that is ready first waits for the other's job"
    for job in read_manifest(folder).jobs:
        assert (folder / job.folder / "train.log").read_text().count("run folder:") == 1, "trained once"

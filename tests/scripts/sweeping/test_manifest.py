"""manifest.json: its form, and that nothing is lost when several processes change it."""

import dataclasses
import json
import multiprocessing
from pathlib import Path

import pytest

from model.training.run_folder import RunFolderError
from scripts.reporting.manifest import JobEntry, Manifest, read_manifest, was_killed
from scripts.sweeping.locks import changing, changing_job, is_running, lock

JOB = {
    "hash": "0123456789ab", "label": "window width=256", "overrides": ["attention=window", "seed=1"], "seed": 1,
    "baseline": False, "folder": "0123456789ab", "command": "python train.py attention=window seed=1",
    "role": "pattern", "first_stage": None, "flops": None, "pattern": None, "state": "done",
    "started": "2026-01-31T12:00:00+00:00", "ended": "2026-01-31T12:01:00+00:00", "seconds": 60.0, "exit_reason": None,
    "traceback": None, "host": None, "ran_on": "machine, CUDA_VISIBLE_DEVICES=0",
}  # fmt: skip
MANIFEST = {
    "sweep": "patterns", "match": "tokens", "budget": {"tokens": 1000}, "command": "python train.py -m sweep=patterns",
    "versions": {"python": "3.12", "torch": "2.13", "lightning": "2.6", "farsight": "0.1"},
    "first_stage": None, "device": "cpu", "jobs": [JOB],
}  # fmt: skip


def manifest(*jobs: str) -> Manifest:
    made = [JobEntry(**(JOB | {"hash": name, "state": "waiting", "seconds": None})) for name in jobs]
    return Manifest(**(MANIFEST | {"jobs": made}))


def test_the_form_is_the_one_that_reports_read(tmp_path):
    (tmp_path / "manifest.json").write_text(json.dumps(MANIFEST | {"later": 1}))
    assert read_manifest(tmp_path).to_dict() == MANIFEST
    assert read_manifest(tmp_path).job("0123456789ab").name == "window width=256 seed=1"
    assert read_manifest(tmp_path).job("f") is None


def test_a_job_adds_up_the_seconds_of_its_attempts(tmp_path):
    with changing(tmp_path, manifest("a")) as new:
        job = new.job("a")
        job.started = None
    with changing_job(tmp_path, "a") as job:
        job.start()
        job.end("failed", 2.0, "reason", "trace")
    first = read_manifest(tmp_path).job("a")
    assert (first.state, first.seconds, first.exit_reason, first.traceback) == ("failed", 2.0, "reason", "trace")
    with changing_job(tmp_path, "a") as job:
        job.start()
    assert (job.exit_reason, job.traceback, job.ended, job.started) == (None, None, None, first.started)
    with changing_job(tmp_path, "a") as job:
        job.end("done", 3.0)
    assert read_manifest(tmp_path).job("a").seconds == 5.0


@pytest.mark.parametrize(
    "text", [json.dumps(MANIFEST)[:-200], "", "[]", '{"jobs": []}', json.dumps(MANIFEST | {"jobs": [{"id": 3}]})]
)
def test_a_manifest_that_is_none_is_one_line_and_stays(tmp_path, text):
    """Cut in half, or of a version with other keys."""
    file = tmp_path / "manifest.json"
    file.write_text(text)
    said = r"manifest\.json: cannot be read as a sweep's manifest \(\w+: "
    with pytest.raises(RunFolderError, match=said) as error, changing(tmp_path, manifest("a")):
        pytest.fail("nothing to change")
    assert "\n" not in str(error.value) and "move it away" in str(error.value)
    assert file.read_text() == text


def _end_jobs(folder: Path, jobs: list[str]) -> None:
    for job in jobs:
        with changing_job(folder, job) as noted:
            noted.end("done", 1.0)


def test_processes_lose_none_of_each_others_changes(tmp_path):
    names = [[f"{process}-{number}" for number in range(15)] for process in range(3)]
    with changing(tmp_path, manifest(*(name for some in names for name in some))):
        pass
    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=_end_jobs, args=(tmp_path, some)) for some in names]
    for process in processes:
        process.start()
    while any(process.is_alive() for process in processes):
        read_manifest(tmp_path)  # never half written
    assert all(job.state == "done" for job in read_manifest(tmp_path).jobs)
    assert not list(tmp_path.glob("*.partial"))


def _hold(folder: Path, held, release) -> None:
    with lock(folder, "a"):
        held.set()
        release.wait(60)


def test_a_job_runs_as_long_as_its_process_lives(tmp_path):
    job = manifest("a").job("a")
    job.start()
    assert not was_killed(tmp_path, job), "a copy without locks"
    assert not list(tmp_path.iterdir()), "it only looks"
    assert not is_running(tmp_path, job)
    fork = multiprocessing.get_context("fork")
    held, release = fork.Event(), fork.Event()
    process = fork.Process(target=_hold, args=(tmp_path, held, release))
    process.start()
    assert held.wait(60) and is_running(tmp_path, job) and not was_killed(tmp_path, job)
    process.kill()
    process.join()
    assert not is_running(tmp_path, job) and was_killed(tmp_path, job)
    for changes in ({"host": "another machine"}, {"host": None}, {"state": "waiting"}):
        assert not was_killed(tmp_path, dataclasses.replace(job, **changes)), changes
    with lock(tmp_path, "a"):
        assert not was_killed(tmp_path, job), "seen by the process that holds it, too"
    job.end("done", 1.0)
    assert job.host is None, "a manifest that is passed on names no machine"

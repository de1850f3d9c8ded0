"""Sweeps of jobs that take a second, or, with `quick`, none."""

import contextlib
import json
import multiprocessing
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from multiprocessing.synchronize import Event
from pathlib import Path

import pytest

import train
from model.training.run_folder import RunFolder, config_hash
from scripts.reporting.manifest import read_manifest
from scripts.sweeping.composer import Composer
from scripts.sweeping.launch import launch
from scripts.sweeping.locks import changing_job, lock
from scripts.sweeping.plan import Draft, Plan
from tests.commands import ForkedProcess, started
from tests.scripts.runs import SMALL, write_books

TRAINER = ("trainer.max_steps=6", "trainer.validate_every=3", "trainer.save_every=2", "trainer.log_every=1")


@pytest.fixture(scope="session")
def small(tmp_path_factory) -> list[str]:
    """Overrides of a run of a second."""
    folder = tmp_path_factory.mktemp("sweeps")
    corpus = ["data=files", f"data.path={write_books(folder / 'books')}", f"data.cache={folder / 'cache'}"]
    return [*SMALL, *TRAINER, *corpus, "evaluation=chunked", "evaluation.baselines=false", "sweep.control=null"]


@pytest.fixture
def reports(monkeypatch) -> list[list[str]]:
    """The states of all jobs at each time that a report was written."""
    written: list[list[str]] = []
    for place in ("worker", "sweep"):
        monkeypatch.setattr(
            f"scripts.sweeping.{place}.report", lambda f: written.append([j.state for j in read_manifest(f).jobs])
        )
    return written


@pytest.fixture
def quick(monkeypatch) -> dict[str, Callable]:
    """Jobs that train nothing. What is put under a label in the dictionary is called first, and may raise."""
    happens: dict[str, Callable] = {}

    def train_nothing(config: dict, path: Path) -> dict:
        job = read_manifest(path.parent).job(config_hash(config))
        assert job.state == "running" and job.folder == path.name
        if job.label in happens:
            happens[job.label]()
        folder, _ = RunFolder.create_or_continue(path, config)
        return folder.write_summary(state="finished", step=6, bits_per_byte=float(config["seed"]), device="stand-in")

    monkeypatch.setattr(train, "train", train_nothing)
    return happens


def jobs_of(*arguments: str) -> list[Draft]:
    """What a sweep's command line would run; without a control, unless the command line sets its length."""
    control = [] if any(argument.startswith("sweep.control=") for argument in arguments) else ["sweep.control=null"]
    with Composer(["-m", *arguments, *control]) as composer:
        return Plan(composer).drafts()


def run_sweep(outputs: Path, *arguments: str) -> int:
    return launch(["-m", *arguments, f"outputs={outputs}"], train.train)


def states(folder: Path) -> dict[str, str]:
    return {job.name: job.state for job in read_manifest(folder).jobs}


def table(folder: Path) -> dict[str, list]:
    """By job: its held-out losses, whole and by position, to the last bit."""
    found = {}
    for job in read_manifest(folder).jobs:
        (row,) = json.loads((folder / job.folder / "evaluation.json").read_text())["rows"]
        found[job.name] = [row["nll_nats"], row["bits_per_byte"], [part["loss"] for part in row["by_position"]]]
    return found


def wait_for(condition: Callable[[], bool], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def without_report(outputs: Path) -> None:
    """Lets the sweep "patterns" write no report, in whichever process: its figures take longer than small jobs."""
    (outputs / "patterns").mkdir(parents=True)
    (outputs / "patterns" / "report").touch()  # where the report's folder would be


def start(outputs: Path, *arguments: str) -> AbstractContextManager[ForkedProcess]:
    """The sweep in a process of its own, and a process group of its own, as a terminal makes one."""
    return started("train.py", "-m", *arguments, f"outputs={outputs}")


def _hold_job(folder: Path, hash: str, state: str, held: Event, release: Event) -> None:
    with lock(folder, hash):
        with changing_job(folder, hash) as job:
            job.start()
        held.set()
        release.wait(60)
        with changing_job(folder, hash) as job:
            job.end(state, 1.0)


@contextlib.contextmanager
def run_by_another(folder: Path, hash: str, state: str) -> Iterator[Event]:
    """While the block runs, another process runs a job, and ends it with `state` once the yielded event is set."""
    fork = multiprocessing.get_context("fork")
    held, release = fork.Event(), fork.Event()
    other = fork.Process(target=_hold_job, args=(folder, hash, state, held, release))
    other.start()
    assert held.wait(60)
    try:
        yield release
    finally:
        release.set()
        other.join()


def at_message(part: str, happens: Callable[[], None]) -> Callable[..., None]:
    """Returns a function to take the place of log.info. It calls `happens` when a message contains `part`."""

    def info(message: str, *values: object) -> None:
        if part in message % values:
            happens()

    return info

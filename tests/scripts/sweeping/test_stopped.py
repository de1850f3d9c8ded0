"""Jobs in other processes than the sweep's, when the sweep is stopped or killed: they save, and none lives on."""

import contextlib
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
import types

import pytest
import torch
from hydra.core.utils import JobStatus

from scripts.reporting.manifest import read_manifest
from scripts.sweeping import own_process
from scripts.sweeping import worker as worker_module
from scripts.sweeping.composer import Composer
from scripts.sweeping.locks import changing_job, is_running
from tests.commands import ROOT, read_log
from tests.scripts.sweeping.conftest import run_sweep, start, states, wait_for, without_report

TWO = ("sweep=patterns", "sweep.baseline=null", "attention=window,strided")
LONG = ("trainer.max_steps=3000", "trainer.validate_every=3000", "trainer.save_every=3000")
"""Some ten seconds and more, without a save unless somebody asks for it."""


def saved_step(folder) -> int:
    """Of the first job's last checkpoint."""
    return torch.load(folder / read_manifest(folder).jobs[0].folder / "checkpoints/last.ckpt", weights_only=True)[
        "global_step"
    ]


@pytest.mark.slow  # two processes, which import everything, one after the other
def test_ctrl_c_in_a_terminal_saves_the_job_in_its_own_process_and_begins_no_other(tmp_path, small, reports):
    folder = tmp_path / "patterns"
    without_report(tmp_path)
    with start(tmp_path, *TWO, *small, *LONG, "sweep.isolate=true") as process:
        read_log(process, "step 5/3000")
        os.killpg(process.pid, signal.SIGINT)
        rest = process.stderr.read()  # to its end: until nobody is left
    assert process.returncode == 130 and "job 2/2" not in rest and "Traceback" not in rest
    assert states(folder) == {"window seed=1": "interrupted", "strided seed=1": "waiting"}
    reason = read_manifest(folder).jobs[0].exit_reason
    assert reason == f"stopped at step {saved_step(folder)}"


class Joblib:
    """A launcher that looks like joblib's, in the moment of a Ctrl-C: its workers save, and it returns."""

    def launch(self, overrides, _):
        os.kill(os.getpid(), signal.SIGINT)
        return [types.SimpleNamespace(status=JobStatus.COMPLETED) for _ in overrides]


def test_ctrl_c_lets_joblibs_workers_save_before_it_stops_the_sweep(tmp_path, small, reports, monkeypatch):
    monkeypatch.setattr(Joblib, "__module__", "hydra_plugins.hydra_joblib_launcher.joblib_launcher")
    returned = []
    launch = Joblib.launch
    monkeypatch.setattr(Joblib, "launch", lambda *all: returned.append(launch(*all)) or returned[0])
    monkeypatch.setattr(Composer, "launcher", lambda *_: Joblib())
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        run_sweep(tmp_path, *TWO, *small)
    assert len(returned) == 1, "nothing was raised into joblib, which would have killed its workers"
    assert reports == [["waiting", "waiting"]] and signal.getsignal(signal.SIGINT) is before


def test_a_worker_that_was_stopped_begins_no_other_job_and_raises_nothing(tmp_path, small, quick, reports, monkeypatch):
    jobs = ("sweep=patterns", "sweep.baseline=null", "attention=dense,window,strided", *small)
    begun, bound = [], []
    quick["dense"] = lambda: begun.append("dense")
    quick["window"] = lambda: begun.append("window") or signal.raise_signal(signal.SIGINT)
    quick["strided"] = lambda: begun.append("strided")
    monkeypatch.setattr(worker_module, "stopped", [])
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores SIGINT
    with pytest.raises(KeyboardInterrupt):
        run_sweep(tmp_path, *jobs)  # in the sweep's own process
    monkeypatch.setattr(multiprocessing, "parent_process", lambda: types.SimpleNamespace(pid=7))
    monkeypatch.setattr(worker_module, "ending_with_parent", lambda pid: bound.append(pid) or contextlib.nullcontext())
    assert run_sweep(tmp_path, *jobs) == 1
    assert list(states(tmp_path / "patterns").values()) == ["done", "interrupted", "waiting"]
    assert begun == ["dense", "window", "window"] and bound == [7, 7]
    signal.signal(signal.SIGINT, before)


@pytest.mark.slow  # two processes, which import everything, one after the other
def test_joblibs_workers_save_and_end_when_the_sweep_is_killed(tmp_path, small, reports):
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    folder = tmp_path / "patterns"
    without_report(tmp_path)
    with start(
        tmp_path, *TWO[:2], "attention=window", *small, *LONG, "hydra/launcher=joblib", "hydra.launcher.n_jobs=2"
    ) as process:
        read_log(process, "step 5/3000")
        process.kill()
        wait_for(lambda: states(folder)["window seed=1"] != "running", seconds=20)
        job = read_manifest(folder).jobs[0]
        assert (job.state, job.exit_reason) == ("interrupted", f"stopped at step {saved_step(folder)}")
        wait_for(lambda: not is_running(folder, job), seconds=20)


ORPHAN = """
import runpy, sys, time
with runpy.run_path("scripts/sweeping/parent_watchdog.py")["ending_with_parent"](int(sys.argv[1])):
    print("bound", flush=True)
    time.sleep(60)
"""


def test_a_process_ends_with_the_one_that_started_it():
    middle = [sys.executable, "-c", "import os, subprocess, sys; subprocess.Popen([sys.executable, '-c', sys.argv[1], "
              "str(os.getpid())]); sys.stdin.read()", ORPHAN]  # fmt: skip
    with subprocess.Popen(middle, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT) as parent:
        assert parent.stdout.readline() == "bound\n"
        parent.kill()
        began = time.monotonic()
        assert parent.stdout.read() == "" and time.monotonic() - began < 20, "its end closes what it has inherited"


def test_a_process_whose_parent_is_gone_already_does_nothing():
    orphan = subprocess.run(
        [sys.executable, "-c", ORPHAN, str(os.getpid() + 1)], capture_output=True, text=True, cwd=ROOT
    )
    assert (orphan.returncode, orphan.stdout) == (1, "")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_who_stops_the_sweep_stops_the_job_once(number):
    counts = f"""
import signal, time
found = []
signal.signal({int(number)}, lambda *_: found.append(1))
print("ready", flush=True)
end = time.monotonic() + 20
while not found and time.monotonic() < end:
    time.sleep(0.01)
time.sleep(0.4)
raise SystemExit(len(found))
"""
    with subprocess.Popen([sys.executable, "-c", counts], stdout=subprocess.PIPE, process_group=0) as process:
        process.stdout.readline()
        threading.Timer(0.2, os.kill, (os.getpid(), number)).start()
        assert own_process.wait(process) == (1, True)


def test_a_stop_while_the_last_job_ends_begins_no_other(tmp_path, small, reports, monkeypatch):
    class Process:
        """Done in the very moment in which somebody presses Ctrl-C."""

        pid = 2**22 + 1  # above the largest that Linux gives: there is none

        def __init__(self, *_, **__):
            pass

        def wait(self):
            with changing_job(tmp_path / "patterns", read_manifest(tmp_path / "patterns").jobs[0].hash) as job:
                job.end("done", 1.0)
            os.kill(os.getpid(), signal.SIGINT)
            return 0

    monkeypatch.setattr(own_process, "subprocess", types.SimpleNamespace(Popen=Process))
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        run_sweep(tmp_path, *TWO, *small, "sweep.isolate=true")
    assert list(states(tmp_path / "patterns").values()) == ["done", "waiting"]
    assert signal.getsignal(signal.SIGINT) is before

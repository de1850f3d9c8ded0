"""The watch over the other ranks, in one process; tests/model/parallel/test_faults.py has whole runs."""

import os
import threading
from types import SimpleNamespace

import pytest

from model.training import ranks
from model.training.ranks import REPORTED, Ranks
from model.training.run_folder import RunFolder


@pytest.mark.parametrize(("failed", "exits"), [(False, []), (True, [REPORTED])])
def test_a_rank_that_has_finished_goes_on_though_another_one_fails_while_it_exits(tmp_path, monkeypatch, failed, exits):
    """It evaluates the model then. A rank that has failed exits even if its main thread waits for ever."""
    statuses = []
    monkeypatch.setattr(os, "_exit", statuses.append)
    monkeypatch.setattr(ranks, "EXIT_SECONDS", 0.0)
    watch = Ranks(RunFolder(tmp_path), timeout=60.0)
    watch.start([SimpleNamespace(poll=lambda: 1, kill=lambda: None)])
    (thread,) = (each for each in threading.enumerate() if each.name == "ranks")
    assert watch.found.wait(10)
    watch.stop(failed)
    thread.join(10)
    assert not thread.is_alive() and statuses == exits

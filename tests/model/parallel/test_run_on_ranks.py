"""run_on_ranks: what a test learns of a rank that crashes."""

import ctypes
import os

import pytest
import torch.multiprocessing

from tests.model.parallel.ranks import run_on_ranks


def threads_of_parent() -> int:
    return len(os.listdir(f"/proc/{os.getppid()}/task"))


def test_ranks_are_forked_from_a_process_of_one_thread():
    """A fork copies the locks that other threads hold, and no thread that would release them."""
    assert run_on_ranks(threads_of_parent, 2) == [1, 1]


def test_a_crash_of_a_rank_says_where_it_was():
    with pytest.raises(torch.multiprocessing.ProcessExitedException, match="SIGSEGV") as caught:
        run_on_ranks(ctypes.string_at, 2, 0)
    assert "in string_at" in "".join(caught.value.__notes__)

"""Processes that a sweep has started for its jobs, when the sweep itself is gone.

A sweep that is killed (SIGKILL, the system out of memory) cannot tell its workers. They would train to the end of what
they have, beside the same sweep launched again, which finds their jobs running in another process. So each looks once
in a while for the process that has started it, and where that is gone its run is asked to stop as by SIGTERM: it
finishes the step, saves, and goes on when the sweep is launched again. Jobs on a cluster have no such parent, and live.
"""

import contextlib
import functools
import logging
import os
import signal
import threading
import time
from collections.abc import Iterator

log = logging.getLogger(__name__)

PATIENCE = 1.0
"""Seconds between two looks."""


@contextlib.contextmanager
def bound_to(parent: int | None) -> Iterator[None]:
    """The block, and this process with it, ends when the process `parent` does, which must have started this one. None
    is nobody."""
    if parent is None:
        yield
        return
    _leave_if_gone(parent)
    _watch(parent)
    try:
        yield
    finally:
        _leave_if_gone(parent)


def _leave_if_gone(parent: int) -> None:
    """Nobody waits for a result, and no further job must begin. Not by an exception: a pool's worker would catch it."""
    if os.getppid() != parent:
        logging.shutdown()
        os._exit(1)


@functools.cache  # one thread does for all jobs of a process
def _watch(parent: int) -> None:
    def look() -> None:
        while os.getppid() == parent:
            time.sleep(PATIENCE)
        log.warning("the sweep's process is gone")
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=look, name="look for the sweep", daemon=True).start()

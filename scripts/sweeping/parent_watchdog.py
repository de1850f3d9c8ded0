"""Ends the processes of a sweep's jobs when the sweep's own process is gone.

A sweep that is killed (SIGKILL, out of memory) cannot stop its workers. They would continue to train, and the same
sweep, launched again, would find their jobs running. So each worker polls its parent process. When the parent is gone,
the worker sends itself SIGTERM: the run finishes its step, saves, and can be resumed by the next launch. Jobs on a
cluster have no such parent and continue.
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

POLL_SECONDS = 1.0


@contextlib.contextmanager
def ending_with_parent(parent: int) -> Iterator[None]:
    """Runs the block, and ends it and this process when the process `parent`, which started this one, ends."""
    _exit_if_gone(parent)
    _watch(parent)
    try:
        yield
    finally:
        _exit_if_gone(parent)


def _exit_if_gone(parent: int) -> None:
    """Exits without an exception, which a pool's worker would catch before it started another job."""
    if os.getppid() != parent:
        logging.shutdown()
        os._exit(1)


@functools.cache  # one thread serves all jobs of a process
def _watch(parent: int) -> None:
    def poll() -> None:
        while os.getppid() == parent:
            time.sleep(POLL_SECONDS)
        log.warning("the sweep's process is gone")
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=poll, name="parent watchdog", daemon=True).start()

"""The end of a command whose standard output is a pipe that its reader closes, as `| head` does."""

import os
import select
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO


@contextmanager
def output_may_close() -> Iterator[None]:
    """Ends the process without a traceback where the reader of its standard output has closed it. The exit status is
    that of a shell after SIGPIPE. Every command runs inside."""
    try:
        try:
            yield
        finally:
            if sys.stdout:  # None in a process that is started without one
                sys.stdout.flush()  # an error while Python flushes it at its end would be printed
    except (BrokenPipeError, SystemExit) as error:
        by_rich = isinstance(error, SystemExit) and isinstance(error.__context__, BrokenPipeError)
        if not by_rich and not (isinstance(error, BrokenPipeError) and sys.stdout and _is_closed(sys.stdout)):
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what the buffer still holds
        sys.exit(128 + signal.SIGPIPE)


def _is_closed(stream: IO) -> bool:
    """Whether `stream` is a pipe that nobody reads any more."""
    poll = select.poll()
    poll.register(stream, select.POLLOUT)
    return any(event & select.POLLERR for _, event in poll.poll(0))

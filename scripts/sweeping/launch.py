"""python train.py -m sweep=...: runs the jobs of a sweep that are not done."""

import contextlib
import errno
from collections.abc import Iterator, Sequence
from pathlib import Path

from configs.errors import ConfigError
from scripts.console import user_errors
from scripts.sweeping.composer import Composer
from scripts.sweeping.plan import Plan
from scripts.sweeping.search import search
from scripts.sweeping.sweep import Sweep
from scripts.sweeping.worker import Train


def launch(arguments: Sequence[str], train: Train) -> int:
    """Runs the jobs of a sweep that are not done.

    Args:
        arguments: the command line, with `-m`.
        train: trains a job's config in a run folder; cloudpickle must be able to pickle it.

    Returns:
        The exit status: 0 if all jobs are done, else 1.

    Raises:
        SystemExit: status 2 after a one-line error, for wrong settings.
        KeyboardInterrupt: the user stopped the sweep.
    """
    with user_errors(), Composer(arguments) as composer:
        plan = Plan(composer)
        sweep = Sweep(plan, train)
        with storage_errors(plan.folder):
            return sweep.run() if plan.settings.search is None else search(sweep)


@contextlib.contextmanager
def storage_errors(folder: Path) -> Iterator[None]:
    """Turns what the file system refuses (disk full, read-only, missing folder) into a one-line ConfigError.

    The manifest is written atomically, so that nothing is lost.
    """
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
        if not full and not str(error.filename or "").startswith(str(folder.parent)):
            raise
        where = f" ({error.filename})" if error.filename else ""
        hint = "make it writable and launch the sweep again, which continues, or set another outputs="
        raise ConfigError(f"{folder}: {error.strerror}{where}; {hint}") from error

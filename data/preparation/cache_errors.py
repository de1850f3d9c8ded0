"""Errors of the file system while the cache is written, as errors of the setting `data.cache`."""

import contextlib
import errno
import shutil
from collections.abc import Iterator
from pathlib import Path

from ..errors import CorpusError

FULL = errno.ENOSPC, errno.EDQUOT


@contextlib.contextmanager
def cache_errors(cache: Path) -> Iterator[None]:
    """Turns a full disk, a read-only file system or a plain file in the place of `cache` into a CorpusError."""
    try:
        yield
    except Exception as error:
        cause: BaseException | None = error  # `datasets` wraps the system's errors in its own
        while cause is not None and not (isinstance(cause, OSError) and _concerns(cause, cache.absolute())):
            cause = cause.__cause__ or cause.__context__
        if cause is None:
            raise
        free = ""
        if cause.errno in FULL:
            existing = next(path for path in (cache.absolute(), *cache.absolute().parents) if path.is_dir())
            free = f"; {shutil.disk_usage(existing).free:,} bytes free"
        needed = "a folder that can be written, with room for the corpus"
        raise CorpusError(f"data.cache={cache}: must be {needed}: {cause.strerror}{free}") from error


def _concerns(error: OSError, cache: Path) -> bool:
    """Whether the error is about writing `cache`. (Documents are only read.)"""
    file = Path(str(error.filename or "")).absolute()
    return error.errno in (*FULL, errno.EFBIG, errno.EROFS) or (
        error.filename is not None and (file.is_relative_to(cache) or cache.is_relative_to(file))
    )

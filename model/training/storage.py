"""Writes files and folders whole or not at all. Errors name the file, and on a full disk the missing space."""

import contextlib
import errno
import json
import math
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

FULL = errno.ENOSPC, errno.EDQUOT
REFUSALS = *FULL, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EEXIST, errno.EISDIR
"""Error numbers with which a file system refuses a file. The user can remove the cause."""


class StorageError(OSError):
    """A file cannot be written. Its line holds the path, the reason, and on a full disk the bytes needed and free."""

    def __str__(self) -> str:
        return f"{self.filename}: cannot be written: {self.strerror}"


@contextlib.contextmanager
def naming(path: Path, needed: int | None = None) -> Iterator[None]:
    """Context manager: an error of the file system becomes a StorageError about `path`.

    needed: bytes that will be written, for the message on a full disk.
    """
    try:
        yield
    except StorageError:
        raise
    except Exception as error:
        cause = system_error(error)
        if cause is None:
            raise
        reason = str(cause.strerror)
        if cause.errno in FULL:
            reason += f"; {needed:,} bytes needed" if needed is not None else ""
            free = free_bytes(path)
            reason += f"; {free:,} bytes free" if free is not None else ""
        raise StorageError(cause.errno, reason, str(path)) from error


def make_folder(folder: Path) -> None:
    """Makes a folder and its parents if they are missing.

    Raises:
        StorageError: a plain file is in the way, or the file system refuses.
    """
    with naming(folder):
        folder.mkdir(parents=True, exist_ok=True)


def system_error(error: BaseException | None) -> OSError | None:
    """Returns the OSError that caused `error`, or None. torch.save, for example, raises a RuntimeError after it."""
    while error is not None and not (isinstance(error, OSError) and error.errno is not None):
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return error


def free_bytes(path: Path) -> int | None:
    """Returns the bytes that this user can still write at `path`; None if the system gives no number."""
    place = next((folder for folder in path.absolute().parents if folder.is_dir()), Path("/"))
    try:
        return shutil.disk_usage(place).free
    except OSError:
        return None


@contextlib.contextmanager
def replacing(path: Path, needed: int | None = None, partial: Path | None = None) -> Iterator[BinaryIO]:
    """Yields a file that takes the place of `path` when the block ends. A crash keeps the file that was there before;
    an error removes the partial one as well.

    Args:
        needed: bytes that will be written, for the message on a full disk.
        partial: where the bytes go first; by default a name that no other process uses.

    Raises:
        StorageError: the file cannot be written.
    """
    partial = partial or path.with_name(f"{path.name}.{os.getpid()}.partial")
    with naming(path, needed):
        try:
            with open(partial, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
        except BaseException:
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)
            raise


@contextlib.contextmanager
def replacing_folder(path: Path, needed: int | None = None) -> Iterator[Path]:
    """Yields a new folder that becomes `path` when the block ends. An error removes it.

    Args:
        path: does not exist, or is an empty folder.
        needed: as for `replacing`.

    Raises:
        StorageError: the folder or a file in it cannot be written.
    """
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    make_folder(path.parent)
    with naming(path, needed):
        shutil.rmtree(partial, ignore_errors=True)  # of a killed process with the same number
        try:
            partial.mkdir()
            yield partial
            os.replace(partial, path)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise


def write_atomically(path: Path, content: str | bytes) -> None:
    """Writes a file whole or not at all."""
    content = content.encode() if isinstance(content, str) else content
    with replacing(path, len(content)) as file:
        file.write(content)


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file whole or not at all. NaN and infinity, which JSON does not have, become null."""
    write_atomically(path, json.dumps(_finite(value), indent=2, default=str) + "\n")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value

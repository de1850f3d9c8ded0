"""Reads the files in an archive: .zip, .tar or .tgz."""

import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

ARCHIVES = (".zip", ".tar", ".tgz")

UNREADABLE = tarfile.TarError, zipfile.BadZipFile, RuntimeError, NotImplementedError
"""Exceptions for an archive that is broken, encrypted, or compressed in another way."""


def members(archive: Path, ending: str) -> Iterator[tuple[str, BinaryIO]]:
    """Yields the name and the opened content of each file in an archive, in its order. Hidden files are left out.

    ending: the one of ARCHIVES.
    """
    if ending == ".zip":
        with zipfile.ZipFile(archive) as opened:
            for member in opened.infolist():
                if not member.is_dir() and _is_read(member.filename):
                    with opened.open(member) as stream:
                        yield member.filename, stream
        return
    with tarfile.open(archive) as opened:
        for member in opened:
            content = opened.extractfile(member) if member.isfile() and _is_read(member.name) else None
            if content is not None:
                yield member.name, content


def _is_read(name: str) -> bool:
    parts = [part for part in name.split("/") if part != "."]
    return not any(part.startswith(".") or part == "__MACOSX" for part in parts)

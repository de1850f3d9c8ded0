"""Finds the files of a folder or a glob, and counts those that are left out."""

import os
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from glob import glob
from pathlib import Path

from ..errors import CorpusError
from .file_rows import COMPRESSED, kind_of


@dataclass
class FoundFiles:
    """The result of a search.

    kinds: the endings of readable files. files: the readable files, sorted. left_out: the number of other files, by
    file extension. hidden: the number of files and folders whose name starts with a dot; such folders are not searched.
    """

    kinds: Sequence[str]
    files: list[Path] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)
    hidden: int = 0

    def add(self, file: Path, exists: bool) -> None:
        if not exists:
            self.left_out["broken links"] += 1
        elif kind_of(file, self.kinds) is None:
            self.left_out[file.suffix.lower() or "without an ending"] += 1
        else:
            self.files.append(file)

    def describe_left_out(self) -> str:
        """Returns a sentence; an empty one if nothing is left out."""
        counts = [f"{count} {ending}" for ending, count in sorted(self.left_out.items())]
        counts += [f"{self.hidden} hidden"] if self.hidden else []
        kinds = f"{' '.join(self.kinds)}, also as {' '.join(COMPRESSED)}; data.source.extensions lists them"
        return f"files are left out: {', '.join(counts)} (read are {kinds})" if counts else ""


def paths_of(path: str | Sequence[str]) -> list[str]:
    """Returns the paths of `data.path`; those of a list are absolute."""
    return [path] if isinstance(path, str) else [os.path.abspath(each) for each in path]


def find_files(path: str | Sequence[str], kinds: Sequence[str]) -> FoundFiles:
    """Finds the files of a folder, of a glob, or the one file `path`, or those of each path of a list, each file once.
    Links to folders are followed, each folder once.

    kinds: the endings of files that can be read, also when compressed.

    Raises:
        CorpusError: a path has no file that can be read, or a folder cannot be listed.
    """
    if not isinstance(path, str):
        return _merged([find_files(each, kinds) for each in paths_of(path)], kinds)
    top = Path(path)
    found = FoundFiles(kinds)
    if top.is_dir():
        _walk(top, found)
    else:
        for name in glob(path, recursive=True):
            if not Path(name).is_dir():
                found.add(Path(name), Path(name).is_file())
    found.files.sort()
    if not found.files:
        if not top.exists() and not any(mark in path for mark in "*?["):
            raise CorpusError(f"data.path={path}: must be a file or folder that exists, or a glob")
        raise CorpusError(f"data.path={path}: must hold files that end in {' '.join(kinds)} (data.source.extensions)")
    return found


def _merged(searches: Sequence[FoundFiles], kinds: Sequence[str]) -> FoundFiles:
    merged = FoundFiles(kinds)
    for found in searches:
        merged.files += found.files
        merged.left_out += found.left_out
        merged.hidden += found.hidden
    merged.files = sorted({file.resolve(): file for file in reversed(sorted(merged.files))}.values())
    return merged


def _walk(top: Path, found: FoundFiles) -> None:
    folders, links, entered = [top], deque[Path](), set()
    while folders or links:  # links come last, so that a file has the name of its own folder
        folder = folders.pop() if folders else links.popleft()
        real = folder.resolve()
        if real in entered:
            continue
        entered.add(real)
        try:
            with os.scandir(folder) as scanned:
                entries = sorted(scanned, key=lambda entry: entry.name)
        except OSError as error:
            raise CorpusError(
                f"data.path={top}: must have folders that can be read: {folder}: {error.strerror}"
            ) from error
        for entry in entries:
            path = folder / entry.name
            target = path if entry.is_symlink() else entry  # an entry raises OSError for a circle of links
            if entry.name.startswith("."):
                found.hidden += 1
            elif target.is_dir():
                (links if entry.is_symlink() else folders).append(path)
            else:
                found.add(path, target.is_file())

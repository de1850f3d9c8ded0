"""Source code as documents: the Python packages that are installed on this machine, or a folder of repositories."""

import hashlib
import logging
import os
import sysconfig
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from ..errors import CorpusError
from .bad_documents import BadDocuments
from .base import Extensions, Paths, Source
from .file_rows import shown, write_rows
from .file_search import find_files, paths_of
from .import_order import import_order
from .splits import SPLITS, split_by_size
from .text import read_utf8

if TYPE_CHECKING:
    from datasets import Dataset

log = logging.getLogger(__name__)

TESTS = ("test", "tests")
VENDORED = ("_vendor", "_vendored", "vendor", "vendored", "third_party", "node_modules")
"""Folders with copies of other packages: the original may be in another split."""

WRITTEN_BY_INSTALLER = "__editable__"
"""Prefix of the file names that pip writes for editable installs. Such files contain absolute paths of this machine."""

SHARED_FILE = 1000  # bytes; shorter files (an empty __init__.py, a version) are the same in unrelated packages


class Code(Source):
    """Source code, one document a package or repository: its files one after another, each below a `# path` line.

    A Python file comes after those that it imports. `path` is a folder; each folder in it is a document, and so is each
    file. None is the folder of the packages that are installed for the running Python. `path` may be a list of folders,
    whose names then begin those of their documents. Documents that have a file in common share a split (lightning and
    pytorch_lightning); validation and test get 5 % of the bytes each.

    extensions: of the files that are read.
    depth: the level below `path` of the folders that are documents: 1 for a folder of packages or repositories, 2 for
        src/ in a checkout, or for repositories by owner.
    tests: whether folders test/ and tests/ are read. They are easier to predict.
    """

    skips = False  # files that are not UTF-8 are always left out of their package
    several_paths = True

    def __init__(self, extensions: Extensions, depth: Annotated[int, Field(ge=1)], tests: bool):
        self.extensions = extensions
        self.depth = depth
        self.tests = tests

    def check(self, path: Paths) -> None:
        for root in _roots(path):
            if root.is_dir():
                continue
            raise CorpusError(
                f"data.path={path if path is None else root}: must be a folder of packages or repositories, or"
                " null for the installed packages"
            )

    def identity(self, path: Paths, cache: Path | None = None) -> dict:
        digest = hashlib.sha256()
        for name, files in self._documents(_roots(path))[0].items():
            for relative, file in files.items():
                content = file.read_bytes()
                digest.update(f"{name}\0{relative}\0{len(content)}\0".encode())
                digest.update(content)
        return {"source": "code", "content": digest.hexdigest()}

    def load(self, path: Paths, arrow_cache: Path, bad: BadDocuments) -> "dict[str, Dataset]":
        roots = _roots(path)
        documents, left_out = self._documents(roots)
        sizes = {name: sum(file.stat().st_size for file in files.values()) for name, files in documents.items()}
        groups = [{name: sizes[name] for name in group} for group in _related(documents)]
        if len(groups) < len(SPLITS):
            found = f"{len(groups)} ({', '.join(documents) or 'none'})"
            raise CorpusError(
                f"data.source.depth={self.depth}: must give at least {len(SPLITS)} documents without common files, one"
                f" for each split, and gives {found} with {' '.join(self.extensions)} in"
                f" data.path={path or roots[0]}"
            )
        split_of = split_by_size(groups)
        splits = {}
        for split in SPLITS:
            names = [name for name in documents if split_of[name] == split]
            names.sort(key=lambda name: (-sizes[name], name))  # long documents first
            rows = ({"name": name, "text": _joined(documents[name], left_out)} for name in names)
            splits[split] = write_rows((row for row in rows if row["text"]), arrow_cache / f"{split}.rows")
        counts = f"{len(documents)} packages, {sum(map(len, documents.values())):,} files"
        log.info(f"code of {path or roots[0]}: {counts}, {sum(sizes.values()) / 1e6:,.1f} MB")
        if left_out:
            log.info(f"files are left out: {', '.join(f'{count:,} {why}' for why, count in left_out.items())}")
        return splits

    def _documents(self, roots: list[Path]) -> tuple[dict[str, dict[str, Path]], Counter[str]]:
        """Returns the files of each document that has text, by their path below its root, and the number of other
        source files by reason."""
        documents: dict[str, dict[str, Path]] = {}
        left_out: Counter[str] = Counter()
        common, read = Path(os.path.commonpath(roots)), set()
        found = [(root, file) for root in roots for file in find_files(str(root), self.extensions).files]
        for root, file in found:
            *folders, name = file.relative_to(root).parts
            if len(roots) > 1:  # a file below two of them is read once
                real = file.resolve()
                if real in read:
                    continue
                read.add(real)
            if name.startswith(WRITTEN_BY_INSTALLER):
                left_out["written by an installer"] += 1
            elif any(folder in VENDORED for folder in folders):
                left_out["copies of other packages (_vendor/)"] += 1
            elif not self.tests and any(folder in TESTS for folder in folders):
                left_out["tests (data.source.tests=true reads them)"] += 1
            elif file.stat().st_size:
                document = "/".join([*root.relative_to(common).parts, *[*folders, name][: self.depth]])
                relative = shown(file.relative_to(root).as_posix())
                documents.setdefault(shown(document), {})[relative] = file
        return documents, left_out


def _roots(path: Paths) -> list[Path]:
    return [Path(each) for each in paths_of(path or sysconfig.get_path("purelib"))]


def _joined(files: dict[str, Path], left_out: Counter[str]) -> str:
    """Returns the text of a document. Counts the files that are not UTF-8."""
    texts: dict[str, str] = {}
    for path, file in files.items():
        text = read_utf8(file)
        if text is None:
            left_out["not UTF-8"] += 1
        elif text.strip():
            texts[path] = text
    return "\n".join(f"# {path}\n{texts[path]}" for path in import_order(texts))


def _related(documents: dict[str, dict[str, Path]]) -> Iterator[list[str]]:
    """Yields groups of documents. Two documents that have a file in common are in the same group."""
    first_with: dict[bytes, str] = {}
    group_of = {name: [name] for name in documents}
    for name, files in documents.items():
        for file in files.values():
            if file.stat().st_size >= SHARED_FILE:
                other = first_with.setdefault(hashlib.sha256(file.read_bytes()).digest(), name)
                ours, theirs = group_of[name], group_of[other]
                if ours is not theirs:
                    theirs.extend(ours)
                    group_of.update(dict.fromkeys(ours, theirs))
    yield from {id(group): group for group in group_of.values()}.values()

"""The user's own files as a source of documents."""

import logging
import os
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from ..digests import FILE as DIGESTS
from ..digests import digests_of
from ..errors import CorpusError
from .bad_documents import BadDocuments
from .base import READER, Extensions, Name, Paths, Similarity, Source
from .file_rows import KINDS, kind_of, read_rows, shown, write_rows
from .file_search import FoundFiles, find_files, paths_of
from .near_duplicates import check_installed
from .splits import (
    SPLIT_NAMES,
    split_by_content,
    split_by_folder,
    split_by_name,
    warn_of_near_duplicates,
    with_test_split,
)
from .tables import READERS

if TYPE_CHECKING:
    from datasets import Dataset

log = logging.getLogger(__name__)

SplitBy = Literal["content", "name", "folder"]

UNDIVIDED = ""
"""The key of all files in the result of `find`, of this and other sources, if they define no splits."""


class Files(Source):
    """The user's own documents. `path` is a folder, a file or a glob of texts, of tables and of archives of both, or a
    list of these. The names of documents begin below the folder, or below the folder that holds all paths of a list.

    A text file is a document; in .jsonl, .json, .csv, .tsv, .parquet and .arrow a row is a document, with its text in
    `text_column`. Folders train/ and valid/ or validation/ (and test/) inside `path` are the splits. If there are none,
    `split_by` decides. Links to folders are followed; files and folders whose name starts with a dot are not read.

    extensions: of the files that are read, also when compressed (data/sources/file_rows.py). Files in a .zip, .tar or
        .tgz are read if both its extension and theirs are listed.
    split_by: `content`, a hash of the document's text; `name`, a hash of its name; or `folder`: the documents of each
        folder inside `path` (of an author) share a split, and validation and test get about 5 % of the text each.
    near_duplicates: documents with at least this similarity (near_duplicates.py) share a split. If folders are the
        splits, held-out documents that are similar to training documents are only counted. None: only equal texts
        share a split.

    Runs of earlier versions were saved without these settings; the defaults reproduce how they read.
    """

    replaces = True
    several_paths = True
    more_splits = "data.source.split_by=folder divides three or more of them by size; or " + Source.more_splits

    def __init__(
        self,
        text_column: Name,
        extensions: Extensions = KINDS,
        split_by: SplitBy = "name",
        near_duplicates: Similarity | None = None,
    ):
        self.text_column = text_column
        self.extensions = tuple(extensions)
        self.split_by = split_by
        self.near_duplicates = near_duplicates

    def check(self, path: Paths) -> None:
        if not path:
            raise CorpusError("data.path=null: must be a folder, a file or a glob, for example books/")
        if self.near_duplicates is not None:
            check_installed(self.near_duplicates)
        self.find(path)

    def identity(self, path: Paths, cache: Path | None = None) -> dict:
        # Names below the folder, and contents: a copy elsewhere has the same identity, whatever its dates.
        root = root_of(path)
        named = [(split, file) for split, found in self.find(path).items() for file in found]
        digests = digests_of([file for _, file in named], cache and cache / DIGESTS)
        files = [[split, name_of(file, root), digest] for (split, file), digest in zip(named, digests, strict=True)]
        settings = {key: value for key, value in vars(self).items() if value is not None}
        return {"source": "files", "reader": READER, **settings, "files": files}

    def load(self, path: Paths, arrow_cache: Path, bad: BadDocuments) -> "dict[str, Dataset]":
        root = root_of(path)
        found = find_files(path, self.extensions)
        if left_out := found.describe_left_out():
            log.warning(f"data.path={path}: {left_out}")
        divided = self._divide(path, found)
        splits: dict[str, Dataset] = {}
        for split, files in divided.items():
            if split == "test" and files is divided["validation"]:  # validation serves as test, and is read once
                splits[split] = splits["validation"]
                continue
            documents = (read_rows(file, name_of(file, root), self.extensions, self.text_column, bad) for file in files)
            splits[split] = write_rows(chain.from_iterable(documents), arrow_cache / f"{split or 'all'}.rows")
        if UNDIVIDED not in splits:
            if self.near_duplicates is not None:
                warn_of_near_duplicates(splits, self.near_duplicates)
            return splits
        divide = {"content": split_by_content, "name": split_by_name, "folder": split_by_folder}
        return divide[self.split_by](splits[UNDIVIDED], self.near_duplicates)

    def find(self, path: str | Sequence[str]) -> dict[str, list[Path]]:
        """Returns the files of each split, texts before tables; all under UNDIVIDED if no folders define splits."""
        return self._divide(path, find_files(path, self.extensions))

    def _divide(self, path: str | Sequence[str], found: FoundFiles) -> dict[str, list[Path]]:
        tops = [Path(each) for each in paths_of(path)]
        files = sorted(found.files, key=lambda file: kind_of(file, READERS) is not None)
        undivided = [top for top in tops if not (top / "train").is_dir()]
        if undivided == tops:
            return {UNDIVIDED: files}
        if undivided:
            raise CorpusError(
                f"data.path={list(path)}: must be folders that all have a folder train/, or paths of which none"
                f" has one; {undivided[0]} has none"
            )

        splits: dict[str, list[Path]] = {}
        for folder, split in SPLIT_NAMES.items():
            inside = [file for file in files if any(file.is_relative_to(top / folder) for top in tops)]
            if inside:
                splits.setdefault(split, []).extend(inside)
        left_out = len(files) - sum(map(len, splits.values()))
        if left_out:
            log.warning(f"data.path={path}: {left_out} files outside {', '.join(SPLIT_NAMES)}/ are not read")
        return with_test_split(splits, path)


def root_of(path: str | Sequence[str]) -> Path:
    """Returns the folder below which the names of documents begin."""
    if isinstance(path, str):
        return Path(path) if Path(path).is_dir() else Path(path).parent
    return Path(os.path.commonpath([root_of(each) for each in paths_of(path)]))


def name_of(file: Path, root: Path) -> str:
    """Returns the name of a file below `root`, or its whole path elsewhere."""
    return shown(file.relative_to(root).as_posix() if file.is_relative_to(root) else file.as_posix())

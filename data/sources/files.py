"""The user's own files as a source of documents."""

import logging
from collections.abc import Iterator
from glob import glob
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import CorpusError
from .base import Name, Source
from .splits import SPLIT_NAMES, split_by_name, with_test_split
from .text import name_and_text, read_utf8, warn_not_utf8

if TYPE_CHECKING:
    from datasets import Dataset

log = logging.getLogger(__name__)

PLAIN_TEXT = (".txt", ".md", ".py")
TABLES = {".jsonl": "json", ".parquet": "parquet"}
"""File endings of tables, and the builder of `datasets` that reads them."""

UNDIVIDED = ""
"""The key of all files in `Files.find` if no folders define splits."""


class Files(Source):
    """The user's own documents. `path` is a folder, a file or a glob of .txt, .md, .py, .jsonl or .parquet.

    A text file is a document; in .jsonl and .parquet a row is a document, with its text in `text_column`. Folders
    train/ and valid/ or validation/ (and test/) inside `path` are the splits. If there are none, a hash of the
    document's name decides.
    """

    def __init__(self, text_column: Name):
        self.text_column = text_column

    def check(self, path: str | None) -> None:
        if not path:
            raise CorpusError("data.path=null: must be a folder, a file or a glob, for example books/")
        self.find(path)

    def identity(self, path: str | None) -> dict:
        # Names, sizes and dates, as `make` uses them: a hash of gigabytes would cost every launch minutes.
        root = _root(path)
        files = []
        for split, found in self.find(path).items():
            for file in found:
                status = file.stat()
                files.append([split, _name(file, root), status.st_size, status.st_mtime_ns])
        return {"source": "files", "text_column": self.text_column, "files": files}

    def load(self, path: str | None, arrow_cache: Path) -> "dict[str, Dataset]":
        from datasets import Dataset, Features, Value, concatenate_datasets, load_dataset

        root = _root(path)
        splits = {}
        for split, files in self.find(path).items():
            loaded = []
            texts = [file for file in files if file.suffix in PLAIN_TEXT]
            if texts:
                rows = Dataset.from_generator(
                    _read_texts,
                    features=Features({"name": Value("string"), "text": Value("string")}),
                    gen_kwargs={"files": texts, "root": root},
                    cache_dir=str(arrow_cache / split),
                    writer_batch_size=16,  # Arrow takes less than 2 GB of strings in a batch
                )
                valid = rows.data.column("text").is_valid().to_pylist()
                warn_not_utf8([name for name, decoded in zip(rows["name"], valid, strict=True) if not decoded])
                loaded.append(rows.select([row for row, decoded in enumerate(valid) if decoded]))
            for file in files:
                if file.suffix in TABLES:
                    rows = load_dataset(
                        TABLES[file.suffix], data_files=str(file), split="train", cache_dir=str(arrow_cache)
                    )
                    loaded.append(name_and_text(rows, self.text_column, _name(file, root)))
            splits[split] = concatenate_datasets(loaded) if len(loaded) > 1 else loaded[0]
        return split_by_name(splits[UNDIVIDED]) if UNDIVIDED in splits else splits

    def find(self, path: str) -> dict[str, list[Path]]:
        """Returns the files of each split, sorted; all of them under UNDIVIDED if no folders define splits."""
        endings = (*PLAIN_TEXT, *TABLES)
        top = Path(path)
        if top.is_dir():
            files = sorted(file for file in top.rglob("*") if file.is_file() and file.suffix in endings)
        else:
            files = sorted(Path(name) for name in glob(path, recursive=True) if Path(name).suffix in endings)
        if not files:
            if not top.exists() and not any(mark in path for mark in "*?["):
                raise CorpusError(f"data.path={path}: must be a file or folder that exists, or a glob")
            raise CorpusError(f"data.path={path}: must hold files that end in {' '.join(endings)}")
        if not (top / "train").is_dir():
            return {UNDIVIDED: files}

        splits: dict[str, list[Path]] = {}
        for folder, split in SPLIT_NAMES.items():
            inside = [file for file in files if file.relative_to(top).parts[0] == folder and file.parent != top]
            if inside:
                splits.setdefault(split, []).extend(inside)
        left_out = len(files) - sum(map(len, splits.values()))
        if left_out:
            log.warning(f"data.path={path}: {left_out} files outside {', '.join(SPLIT_NAMES)}/ are not read")
        return with_test_split(splits, path)


def _read_texts(files: list[Path], root: Path) -> Iterator[dict]:
    for file in files:
        yield {"name": _name(file, root), "text": read_utf8(file)}


def _root(path: str) -> Path:
    return Path(path) if Path(path).is_dir() else Path(path).parent


def _name(file: Path, root: Path) -> str:
    return file.relative_to(root).as_posix() if file.is_relative_to(root) else file.as_posix()

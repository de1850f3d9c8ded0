"""Where documents come from.

A source says how to read a `path`. It answers three questions, in the order in which they are asked:

    check(path)     can this work at all?          (milliseconds; raises CorpusError)
    identity(path)  what exactly would be read?    (a plain dict; it becomes part of the cache's fingerprint)
    load(path, ..)  the documents themselves       ({"train": Dataset, ...}; columns: name, text; a row: a document)

Documents stay whole, and a document is on one side of the split only. Where the data brings no split of its own, a hash
of the document's name decides: adding a document never moves another one to the other side.
"""

import hashlib
import logging
import os
import sysconfig
from abc import ABC, abstractmethod
from collections.abc import Iterator
from glob import glob
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from .errors import CorpusError

if TYPE_CHECKING:
    from datasets import Dataset

log = logging.getLogger(__name__)

SPLITS = ("train", "validation", "test")
HELD_OUT_PERCENT = 5  # of the names, for validation, and as many again for test
# Packages are few and unequal, so most salts give lopsided parts. This one was chosen (by size and gzip alone) so that
# both held-out parts of Python 3.11, 3.12 and 3.13's library, with or without its tests, have about 5 % of the bytes
# and are about as compressible as the whole.
SALT = "317:"
PLAIN_TEXT = (".txt", ".md", ".py")
TABLES = {".jsonl": "json", ".parquet": "parquet"}  # file ending -> the builder in `datasets` that reads it
SPLIT_FOLDERS = {"train": "train", "valid": "validation", "validation": "validation", "test": "test"}

Name = Annotated[str, Field(min_length=1)]


class Source(ABC):
    """Base class of all sources; one of your own is a subclass, too."""

    @abstractmethod
    def check(self, path: str | None) -> None: ...
    @abstractmethod
    def identity(self, path: str | None) -> dict: ...
    @abstractmethod
    def load(self, path: str | None, arrow_cache: Path) -> "dict[str, Dataset]": ...


def split_of(name: str) -> str:
    """The split of a name, the same on every machine and in every run (Python's own hash() is salted)."""
    digest = hashlib.sha256(f"{SALT}{name}".encode("utf-8", "surrogateescape")).digest()
    percent = int.from_bytes(digest[:8], "big") % 100
    if percent < HELD_OUT_PERCENT:
        return "validation"
    return "test" if percent < 2 * HELD_OUT_PERCENT else "train"


class StandardLibrary(Source):
    """The Python source on this machine: real, long, structured documents, and nothing to download.

    A document is a top-level module, or a package with its files one after another, each under a `# path` line. Tests
    are documents of their own, on the same side of the split as the module that they test. `path` may name another
    Python's library folder; None is the one that runs.

    tests: with them. They are more than half of the bytes, easier to predict, and missing in some distributions.
    """

    def __init__(self, tests: bool):
        self.tests = tests

    def check(self, path: str | None) -> None:
        root = self._root(path)
        if not (root / "abc.py").is_file():
            raise CorpusError(
                f"data.path={root}: must be the library folder of a Python, with abc.py, or null for this Python's"
            )

    def identity(self, path: str | None) -> dict:
        # The content itself, not dates: the same Python gives the same fingerprint on every machine.
        root = self._root(path)
        digest = hashlib.sha256()
        for files in self._documents(root).values():
            for file in files:
                content = file.read_bytes()
                digest.update(f"{file.relative_to(root).as_posix()}\0{len(content)}\0".encode())
                digest.update(content)
        return {"source": "standard library", "content": digest.hexdigest()}

    def load(self, path: str | None, arrow_cache: Path) -> "dict[str, Dataset]":
        from datasets import Dataset

        root = self._root(path)
        documents = self._documents(root)
        texts, undecodable = {}, []
        for name, files in documents.items():
            parts = []
            for file in files:
                relative, text = file.relative_to(root).as_posix(), _decode(file)
                if text is None:
                    undecodable.append(relative)
                else:
                    parts.append(f"# {relative}\n{text}")
            if parts:
                texts[name] = "\n".join(parts)
        _warn_undecodable(undecodable)

        tests = sum("/" in name for name in texts)
        log.info(f"Python library {root}: {len(texts) - tests} modules and packages, {tests} documents of tests")
        if self.tests and tests == 0:
            log.warning(f"{root} has no tests (some distributions leave them out): the corpus is about half as long")

        modules = {name for name in documents if "/" not in name and not name.startswith("_")}
        rows: dict[str, list[dict]] = {split: [] for split in SPLITS}
        for name in sorted(texts, key=lambda name: (-len(texts[name]), name)):  # long documents first
            rows[split_of(module_tested(name, modules))].append({"name": name, "text": texts[name]})
        return {split: Dataset.from_list(found) for split, found in rows.items() if found}

    @staticmethod
    def _root(path: str | None) -> Path:
        return Path(path or sysconfig.get_path("stdlib"))

    def _documents(self, root: Path) -> dict[str, list[Path]]:
        """The files of each document: `json`, `test/test_json`, `unittest/test`. Only tests have a slash in their name.

        Only files that people wrote: what a build or an installer put there differs from machine to machine.
        """
        documents: dict[str, list[Path]] = {}
        for folder, folders, names in os.walk(root):
            at_top = Path(folder) == root
            skipped = {"site-packages", "dist-packages", "__pycache__"}
            folders[:] = sorted(name for name in folders if name not in skipped and (name.isidentifier() or not at_top))
            for name in sorted(names):
                stem, ending = os.path.splitext(name)
                if ending == ".py" and not (at_top and (stem == "sitecustomize" or not stem.isidentifier())):
                    file = Path(folder, name)
                    parts = file.relative_to(root).with_suffix("").parts
                    in_tests = len(parts) > 1 and (parts[0] == "test" or (len(parts) > 2 and "test" in parts[1]))
                    documents.setdefault("/".join(parts[:2]) if in_tests else parts[0], []).append(file)
        return {name: files for name, files in documents.items() if self.tests or "/" not in name}


def module_tested(document: str, modules: set[str]) -> str:
    """The module that decides a document's side of the split: json for `json`, `test/test_json` and `json/tests`.

    The longest module name that begins the test's name counts, so that test_urllib2 and test_urllib_response go with
    urllib, datetimetester with datetime and _pydecimal with decimal. A test too many on a module's side does no harm.
    """
    folder, _, name = document.partition("/")
    if name and folder != "test":
        return folder
    name = (name or folder).removeprefix("test_").lstrip("_")
    candidates = [module for module in modules if name.startswith(module)]
    if not candidates and name.startswith("py"):
        candidates = [module for module in modules if name.removeprefix("py").startswith(module)]
    return max(candidates, key=len, default=name)


class Files(Source):
    """One's own documents: `path` is a folder, a file or a glob of .txt, .md, .py, .jsonl or .parquet.

    A text file is a document; in .jsonl and .parquet a row is one, its text in `text_column`. Folders train/ and valid/
    or validation/ (and test/) inside `path` are the splits; without them a hash of the document's name splits.
    """

    def __init__(self, text_column: Name):
        self.text_column = text_column

    def check(self, path: str | None) -> None:
        if not path:
            raise CorpusError("data.path=null: must be a folder, a file or a glob, for example books/")
        self._find(path)

    def identity(self, path: str | None) -> dict:
        # Names, sizes and dates, as `make` does it: reading gigabytes to hash them would cost every launch minutes.
        root = self._root(path)
        files = []
        for split, found in self._find(path).items():
            for file in found:
                status = file.stat()
                files.append([split, _name(file, root), status.st_size, status.st_mtime_ns])
        return {"source": "files", "text_column": self.text_column, "files": files}

    def load(self, path: str | None, arrow_cache: Path) -> "dict[str, Dataset]":
        from datasets import Dataset, Features, Value, concatenate_datasets, load_dataset

        found = self._find(path)
        root = self._root(path)
        splits = {}
        for split, files in found.items():
            parts = []
            texts = [file for file in files if file.suffix in PLAIN_TEXT]
            if texts:
                rows = Dataset.from_generator(
                    _read_texts,
                    features=Features({"name": Value("string"), "text": Value("string")}),
                    gen_kwargs={"files": texts, "root": root},
                    cache_dir=str(arrow_cache / split),
                    writer_batch_size=16,  # a batch of strings has to stay below 2 GB
                )
                valid = rows.data.column("text").is_valid().to_pylist()
                _warn_undecodable([name for name, there in zip(rows["name"], valid, strict=True) if not there])
                parts.append(rows.select([row for row, there in enumerate(valid) if there]))
            for file in files:
                if file.suffix in TABLES:
                    rows = load_dataset(
                        TABLES[file.suffix], data_files=str(file), split="train", cache_dir=str(arrow_cache)
                    )
                    parts.append(_name_and_text(rows, self.text_column, _name(file, root)))
            splits[split] = concatenate_datasets(parts) if len(parts) > 1 else parts[0]
        return splits if "" not in splits else _split_by_name(splits[""])

    @staticmethod
    def _root(path: str) -> Path:
        return Path(path) if Path(path).is_dir() else Path(path).parent

    def _find(self, path: str) -> dict[str, list[Path]]:
        """The files of each split, sorted; all of them under "" where no folders name the splits."""
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

        splits: dict[str, list[Path]] = {}
        if top.is_dir() and (top / "train").is_dir():
            for folder, split in SPLIT_FOLDERS.items():
                inside = [file for file in files if file.relative_to(top).parts[0] == folder and file.parent != top]
                if inside:
                    splits.setdefault(split, []).extend(inside)
            left_out = len(files) - sum(map(len, splits.values()))
            if left_out:
                log.warning(f"data.path={path}: {left_out} files outside {', '.join(SPLIT_FOLDERS)}/ are not read")
            return _complete(splits, path)
        return {"": files}


class Hub(Source):
    """Any Hugging Face dataset: `path` is its name on the hub, or a folder that `datasets.load_dataset` can read.

    `config` and `revision` as in load_dataset; pin `revision` where the data must never change. `split` is one split
    (documents are then split by a hash of their number), or null for all splits that the dataset names itself.
    """

    def __init__(self, config: Name | None, split: Name | None, revision: Name | None, text_column: Name):
        self.config = config
        self.split = split
        self.revision = revision
        self.text_column = text_column

    def check(self, path: str | None) -> None:
        if not path:
            raise CorpusError("data.path=null: must be a dataset's name, for example emozilla/pg19")
        if path == "pandas":  # a reader of `datasets` that unpickles whatever lies in the working directory
            raise CorpusError("data.path=pandas: must be a dataset's name, or a folder (./pandas)")

    def identity(self, path: str | None) -> dict:
        identity = {"source": "hub", "path": path, **vars(self)}
        if Path(path).is_dir():  # a local folder: its files may change under the same name
            files = [file for file in sorted(Path(path).rglob("*")) if file.is_file()]
            identity["files"] = [[str(file), file.stat().st_size, file.stat().st_mtime_ns] for file in files]
        return identity

    def load(self, path: str | None, arrow_cache: Path) -> "dict[str, Dataset]":
        from datasets import Dataset, load_dataset
        from datasets.exceptions import DatasetNotFoundError

        try:
            # The hub's own cache keeps what was downloaded; a local folder is read anew into ours.
            cache = str(arrow_cache) if Path(path).is_dir() else None
            loaded = load_dataset(path, self.config, split=self.split, revision=self.revision, cache_dir=cache)
        except (DatasetNotFoundError, FileNotFoundError, ConnectionError, ValueError) as error:
            asked = {"config": self.config, "split": self.split, "revision": self.revision}
            given = "".join(f", data.source.{key}={value}" for key, value in asked.items() if value is not None)
            raise CorpusError(
                f"data.path={path}{given}: must be a dataset that exists: {str(error).splitlines()[0]}"
            ) from error
        if isinstance(loaded, Dataset):
            return _split_by_name(_name_and_text(loaded, self.text_column, path))
        splits = {}
        for name, rows in loaded.items():
            split = SPLIT_FOLDERS.get(name)
            if split is None:
                log.warning(f"{path}: split {name!r} is not read (read are {', '.join(SPLIT_FOLDERS)})")
            else:
                splits[split] = _name_and_text(rows, self.text_column, f"{path}/{name}")
        if set(splits) == {"train"}:
            return _split_by_name(splits["train"])
        return _complete(splits, path)


def _complete(splits: dict, path: str) -> dict:
    """Splits that the data brings itself: train and validation must be there; validation serves as test if need be."""
    for split in ("train", "validation"):
        if split not in splits:
            found = " and ".join(splits) or "neither"
            raise CorpusError(f"data.path={path}: must hold a train and a validation split, and holds {found}")
    if "test" not in splits:
        log.info(f"{path} has no test split: validation serves as test")
        splits["test"] = splits["validation"]
    return splits


def _split_by_name(rows: "Dataset") -> "dict[str, Dataset]":
    sides = [split_of(name) for name in rows["name"]]
    indices = {split: [i for i, side in enumerate(sides) if side == split] for split in SPLITS}
    return {split: rows.select(chosen) for split, chosen in indices.items() if chosen}


def _name_and_text(rows: "Dataset", text_column: str, name: str) -> "Dataset":
    """The two columns that we keep; a row without a name of its own is called after its file and number."""
    if text_column not in rows.column_names:
        columns = ", ".join(rows.column_names)
        raise CorpusError(f"data.source.text_column={text_column}: must be a column of {name}: {columns}")
    rows = rows.select_columns(text_column)
    if text_column != "text":
        rows = rows.rename_column(text_column, "text")
    return rows.add_column("name", [f"{name}:{row}" for row in range(len(rows))])


def _read_texts(files: list[Path], root: Path) -> Iterator[dict]:
    for file in files:
        yield {"name": _name(file, root), "text": _decode(file)}


def _name(file: Path, root: Path) -> str:
    return file.relative_to(root).as_posix() if file.is_relative_to(root) else file.as_posix()


def _decode(file: Path) -> str | None:
    try:
        return file.read_bytes().decode("utf-8")
    except UnicodeDecodeError:
        return None


def _warn_undecodable(files: list[str]) -> None:
    if files:
        log.warning(f"{len(files)} files are not UTF-8 and are left out: {', '.join(files)}")

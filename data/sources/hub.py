"""Datasets of the Hugging Face hub as a source."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from ..digests import FILE as DIGESTS
from ..digests import digests_of
from ..errors import CorpusError
from .bad_documents import BadDocuments
from .base import READER, Name, Source
from .file_rows import KINDS, connection_error, read_rows, shown, write_rows
from .hub_shards import ShardFile, first_documents, list_shards
from .splits import SPLIT_NAMES, digest_of, split_by_content, split_by_name, with_test_split
from .text import name_and_text

if TYPE_CHECKING:
    from datasets import Dataset

log = logging.getLogger(__name__)

Count = Annotated[int, Field(ge=1)]

SAMPLE = 64_000_000  # characters of the training documents in the corpus of a dataset that is streamed
STREAMS = 8  # at least, unless there are fewer files


class Hub(Source):
    """Any Hugging Face dataset. `path` is its name on the hub, or a folder that `datasets.load_dataset` can read.

    config, revision: arguments of `load_dataset`. A pinned revision keeps the data from changing.
    split: one split of the dataset, which `split_by` then divides; None takes the dataset's own splits.
    text_column: the column with the documents' text.
    split_by: `content`: a hash of the document's text decides; `name`: one of its number, as in earlier versions.
    streaming: training reads the documents from the dataset's files, in `streams` at the same time; None is the
        smallest multiple of the ranks that is at least 8, or the largest that is at most the number of files.
    held_out_documents: of a dataset that is streamed, documents of validation and of test. They are the first ones of
        the dataset's own split, or of the training split if it has none, which trains on no copy of them.

    Runs of earlier versions were saved without these settings; the defaults reproduce how they read.
    """

    def __init__(
        self,
        config: Name | None,
        split: Name | None,
        revision: Name | None,
        text_column: Name,
        split_by: Literal["content", "name"] = "name",
        streaming: bool = False,
        streams: Count | None = None,
        held_out_documents: Count = 64,
    ):
        self.split_by = split_by
        self.config = config
        self.split = split
        self.revision = revision
        self.text_column = text_column
        self.streaming = streaming
        self.streams = streams
        self.held_out_documents = held_out_documents
        self._listed: dict[str, dict[str, list[ShardFile]]] = {}

    def check(self, path: str | None) -> None:
        if not path:
            raise CorpusError("data.path=null: must be a dataset's name, for example emozilla/pg19")
        if path == "pandas":  # a builder of `datasets` that unpickles the files in the working directory
            raise CorpusError("data.path=pandas: must be a dataset's name, or a folder (./pandas)")
        if self.streams is not None and not self.streaming:
            raise CorpusError(f"data.source.streams={self.streams}: must be null without data.source.streaming=true")

    def identity(self, path: str | None, cache: Path | None = None) -> dict:
        keys = ("split_by", "config", "split", "revision", "text_column")
        identity = {"source": "hub", "reader": READER, "path": path, **{key: getattr(self, key) for key in keys}}
        if self.streaming:
            shards = {split: [shard.identity for shard in listed] for split, listed in self.shards(path).items()}
            streamed = {"held_out_documents": self.held_out_documents, "sample": SAMPLE, "shards": shards}
            return identity | streamed | {"path": None}
        if Path(path).is_dir():  # the files of a local folder may change while its name stays
            files = [file for file in sorted(Path(path).rglob("*")) if file.is_file()]
            digests = digests_of(files, cache and cache / DIGESTS)
            names = [shown(file.relative_to(path).as_posix()) for file in files]
            identity |= {"path": None, "files": [list(each) for each in zip(names, digests, strict=True)]}
        return identity

    def load(self, path: str | None, arrow_cache: Path, bad: BadDocuments) -> "dict[str, Dataset]":
        from datasets import Dataset, load_dataset
        from datasets.exceptions import DatasetGenerationError

        if Path(path).is_dir():
            self._warn_of_left_out(path)
        if self.streaming:
            return self._first_documents(path, arrow_cache, bad)
        try:
            # Downloads stay in the hub's own cache; a local folder is read into ours, which is deleted.
            cache = str(arrow_cache) if Path(path).is_dir() else None
            with self._existing(path):
                loaded = load_dataset(path, self.config, split=self.split, revision=self.revision, cache_dir=cache)
        except DatasetGenerationError as error:
            raise self._unreadable(path, error) from error
        if isinstance(loaded, Dataset):
            return self._divide(name_and_text(loaded, self.text_column, path, bad))
        splits = {
            split: name_and_text(loaded[name], self.text_column, f"{path}/{name}", bad)
            for name, split in self._known(path, loaded).items()
        }
        if set(splits) == {"train"}:
            return self._divide(splits["train"])
        return with_test_split(splits, path)

    def shards(self, path: str) -> dict[str, list[ShardFile]]:
        """Returns {split: its files} of the splits that are read. If `split` is set, its files are the training's."""
        if path not in self._listed:
            self._listed[path] = self._list(path)
        return self._listed[path]

    def _list(self, path: str) -> dict[str, list[ShardFile]]:
        from datasets import load_dataset_builder

        with self._existing(path):
            listed = list_shards(load_dataset_builder(path, self.config, revision=self.revision), path)
        names, split = list(listed), self.split or "train"
        if self.split is None:
            listed = {split: listed[name] for name, split in self._known(path, listed).items()}
        else:
            listed = {"train": listed[split]} if split in listed else {}
        if "train" not in listed:
            raise CorpusError(f"data.path={path}: must be a dataset with the split {split}, and has {', '.join(names)}")
        if self.streams is not None and self.streams > len(listed["train"]):
            raise CorpusError(
                f"data.source.streams={self.streams}: must be at most {len(listed['train'])}, the number of files to"
                " train on"
            )
        return listed

    def number_of_streams(self, path: str, ranks: int) -> int:
        """Returns `streams`, or its default for a run of so many ranks that train on different sequences.

        Raises:
            CorpusError: there are fewer files than ranks, of which each needs a stream of its own.
        """
        if self.streams is not None:
            return self.streams
        files = len(self.shards(path)["train"])
        if files < ranks:
            raise CorpusError(
                f"data.path={path}: must hold at least {ranks} files to train on, one a rank, and has {files}"
            )
        return min(-(-STREAMS // ranks), files // ranks) * ranks

    def _first_documents(self, path: str, arrow_cache: Path, bad: BadDocuments) -> "dict[str, Dataset]":
        """Returns validation and test, and as training split a sample of the documents to train on."""
        listed, seen = self.shards(path), set()

        def new_documents(split: str) -> Iterator[dict[str, str]]:
            for row in first_documents(listed[split], self.text_column, bad):
                if (digest := digest_of(row["text"])) not in seen:
                    seen.add(digest)
                    yield row

        def write(rows: Iterator[dict[str, str]], split: str) -> "Dataset":
            return write_rows(rows, arrow_cache / f"{split}.rows")

        splits, documents = {}, new_documents("train")
        for split in ("validation", "test"):
            if split in listed or "validation" not in listed:
                rows = new_documents(split) if split in listed else documents
                splits[split] = write(islice(rows, self.held_out_documents), split)
        splits["train"] = write(_sample(documents), "train")
        log.info(f"{path}: the training split below is a sample of {len(splits['train']):,} documents to train on")
        if not len(splits["train"]):
            found = sum(len(splits[split]) for split in splits if split not in listed)
            raise CorpusError(
                f"data.source.held_out_documents={self.held_out_documents}: must leave documents to train on, and the"
                f" training split of {path} has {found} different ones"
            )
        return with_test_split(splits, path)

    def _warn_of_left_out(self, path: str) -> None:
        """Warns if files of a local folder are left out. `datasets` reads those that the dataset's configuration names,
        or without one those of the most frequent format."""
        from datasets import load_dataset_builder

        with self._existing(path):
            read = load_dataset_builder(path, self.config).config.data_files or {}
        files, root = {Path(url).resolve() for urls in read.values() for url in urls}, Path(path)
        left_out = [
            name
            for file in sorted(root.rglob("*"))
            if file.is_file() and file.stat().st_size and file.resolve() not in files
            if not (name := file.relative_to(root).as_posix()).startswith(".") and name != "README.md"
        ]
        if left_out:
            verb, more = ("is", "") if len(left_out) == 1 else ("are", ", ...")
            log.warning(
                f"{path}: {len(files)} files are read, and {len(left_out)} {verb} left out: {shown(left_out[0])}{more}"
            )

    def _known(self, path: str, names: "Iterator[str] | dict") -> dict[str, str]:
        """Returns the split that each of the dataset's own splits stands for. Logs those that are not read."""
        for name in names:
            if name not in SPLIT_NAMES:
                log.warning(f"{path}: split {name!r} is not read (read are {', '.join(SPLIT_NAMES)})")
        return {name: SPLIT_NAMES[name] for name in names if name in SPLIT_NAMES}

    def _divide(self, rows: "Dataset") -> "dict[str, Dataset]":
        return (split_by_content if self.split_by == "content" else split_by_name)(rows)

    @contextmanager
    def _existing(self, path: str) -> Iterator[None]:
        """Turns the errors of `datasets` for a dataset that does not exist into a CorpusError."""
        from datasets.exceptions import DatasetNotFoundError

        try:
            yield
        except CorpusError:
            raise
        except (DatasetNotFoundError, FileNotFoundError, ConnectionError, connection_error(), ValueError) as error:
            asked = {"config": self.config, "split": self.split, "revision": self.revision}
            given = "".join(f", data.source.{key}={value}" for key, value in asked.items() if value is not None)
            reason = str(error).splitlines()[0]
            raise CorpusError(f"data.path={path}{given}: must be a dataset that exists: {reason}") from error

    def _unreadable(self, path: str, error: Exception) -> CorpusError:
        """Returns the error of a dataset that `datasets` found and cannot read. It names the line of a local file, if
        one is at fault."""
        must = f"data.path={path}: must be a dataset that `datasets` can read"
        bad = BadDocuments("skip", path)
        for file in sorted(Path(path).rglob("*.jsonl")) if Path(path).is_dir() else []:
            for _ in read_rows(file, shown(str(file)), KINDS, self.text_column, bad):
                pass
            if bad.count:
                return CorpusError(f"{must}: {bad.examples[0]}; data=files with data.on_bad_document=skip skips it")
        cause: BaseException = error
        while cause.__cause__ or cause.__context__:
            cause = cause.__cause__ or cause.__context__
        reason = " ".join(str(cause).split())
        return CorpusError(f"{must}: {reason}")


def _sample(documents: Iterator[dict[str, str]]) -> Iterator[dict[str, str]]:
    """Yields the next documents, up to the one with which they reach SAMPLE characters."""
    characters = 0
    for row in documents:
        yield row
        characters += len(row["text"])
        if characters >= SAMPLE:
            return

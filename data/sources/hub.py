"""Datasets of the Hugging Face hub as a source."""

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from ..digests import FILE as DIGESTS
from ..digests import digests_of
from ..errors import CorpusError
from .bad_documents import BadDocuments
from .base import READER, Name, Source
from .file_rows import KINDS, read_rows, shown
from .splits import SPLIT_NAMES, split_by_content, split_by_name, with_test_split
from .text import name_and_text

if TYPE_CHECKING:
    from datasets import Dataset

log = logging.getLogger(__name__)


class Hub(Source):
    """Any Hugging Face dataset. `path` is its name on the hub, or a folder that `datasets.load_dataset` can read.

    config, revision: arguments of `load_dataset`. A pinned revision keeps the data from changing.
    split: one split of the dataset, which `split_by` then divides; None takes the dataset's own splits.
    text_column: the column with the documents' text.
    split_by: `content`: a hash of the document's text decides; `name`: one of its number, as in earlier versions.
    """

    def __init__(
        self,
        config: Name | None,
        split: Name | None,
        revision: Name | None,
        text_column: Name,
        split_by: Literal["content", "name"] = "name",
    ):
        self.split_by = split_by
        self.config = config
        self.split = split
        self.revision = revision
        self.text_column = text_column

    def check(self, path: str | None) -> None:
        if not path:
            raise CorpusError("data.path=null: must be a dataset's name, for example emozilla/pg19")
        if path == "pandas":  # a builder of `datasets` that unpickles the files in the working directory
            raise CorpusError("data.path=pandas: must be a dataset's name, or a folder (./pandas)")

    def identity(self, path: str | None, cache: Path | None = None) -> dict:
        identity = {"source": "hub", "reader": READER, "path": path, **vars(self)}
        if Path(path).is_dir():  # the files of a local folder may change while its name stays
            files = [file for file in sorted(Path(path).rglob("*")) if file.is_file()]
            digests = digests_of(files, cache and cache / DIGESTS)
            names = [shown(file.relative_to(path).as_posix()) for file in files]
            identity |= {"path": None, "files": [list(each) for each in zip(names, digests, strict=True)]}
        return identity

    def load(self, path: str | None, arrow_cache: Path, bad: BadDocuments) -> "dict[str, Dataset]":
        from datasets import Dataset, load_dataset
        from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError

        try:
            # Downloads stay in the hub's own cache; a local folder is read into ours, which is deleted.
            cache = str(arrow_cache) if Path(path).is_dir() else None
            loaded = load_dataset(path, self.config, split=self.split, revision=self.revision, cache_dir=cache)
        except (DatasetNotFoundError, FileNotFoundError, ConnectionError, ValueError) as error:
            asked = {"config": self.config, "split": self.split, "revision": self.revision}
            given = "".join(f", data.source.{key}={value}" for key, value in asked.items() if value is not None)
            reason = str(error).splitlines()[0]
            raise CorpusError(f"data.path={path}{given}: must be a dataset that exists: {reason}") from error
        except DatasetGenerationError as error:
            raise self._unreadable(path, error) from error
        if isinstance(loaded, Dataset):
            return self._divide(name_and_text(loaded, self.text_column, path, bad))
        splits = {}
        for name, rows in loaded.items():
            split = SPLIT_NAMES.get(name)
            if split is None:
                log.warning(f"{path}: split {name!r} is not read (read are {', '.join(SPLIT_NAMES)})")
            else:
                splits[split] = name_and_text(rows, self.text_column, f"{path}/{name}", bad)
        if set(splits) == {"train"}:
            return self._divide(splits["train"])
        return with_test_split(splits, path)

    def _divide(self, rows: "Dataset") -> "dict[str, Dataset]":
        return (split_by_content if self.split_by == "content" else split_by_name)(rows)

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

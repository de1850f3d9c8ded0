"""The interface of all sources of documents."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import numpy as np
from pydantic import Field

from ..errors import CorpusError
from .bad_documents import BadDocuments

if TYPE_CHECKING:
    from datasets import Dataset

    from ..collation import Batch
    from ..corpus import Split
    from ..tokenizers import Tokenizer

Paths = str | Sequence[str] | None
"""What `data.path` may be; a list only for sources with `several_paths`."""

Name = Annotated[str, Field(min_length=1)]
Extension = Annotated[str, Field(pattern=r"^\.[a-z0-9_.+-]+$", description="an extension in small letters, like .py")]
Extensions = Annotated[tuple[Extension, ...], Field(min_length=1)]

Similarity = Annotated[float, Field(gt=0, le=1, description="a share of common words, above 0 and at most 1")]

READER = 2  # to be raised if `Files` or `Hub` would read other documents from the same files


class Source(ABC):
    """Reads documents from `path`. Each document is read whole and belongs to exactly one split.

    skips: whether the source can skip unreadable documents, as `data.on_bad_document=skip` asks.
    replaces: whether it can replace bytes that are not UTF-8, as `replace` asks.
    several_paths: whether `path` may be a list.
    weights: of a mixture, the ratio in which training draws from its sources by their names; None otherwise.
    tokens_at_a_time: of a mixture, the tokens of consecutive sequences of one source; None stands for one sequence.
    more_splits: advice in the error about a split without documents.
    byte_unit: the name of a byte of text in the units of losses (../units.py): a byte, or a base of a genome.
    streaming: whether training reads the documents from their files (../streaming). Then the corpus holds the
        documents of validation and test alone, and its training split is a sample of the training documents.
    """

    skips: bool = True
    replaces: bool = False
    several_paths: bool = False
    weights: Mapping[str, int] | None = None
    tokens_at_a_time: int | None = None
    byte_unit: str = "byte"
    more_splits: str = "add documents, or put them into folders train/, validation/ and test/"
    streaming: bool = False

    @property
    def generating(self) -> "Mapping[str, GeneratingSource]":
        """The sources that generate their sequences, by name: those of a mixture, or the source itself under "".
        Empty if all documents are packed into sequences."""
        return {}

    @property
    def mixed(self) -> "Mapping[str, Source]":
        """Of a mixture, its sources by their names; empty otherwise."""
        return {}

    @abstractmethod
    def check(self, path: Paths) -> None:
        """Raises CorpusError for a path that cannot be read."""

    def check_settings(self, path: Paths, on_bad_document: str) -> None:
        """Raises CorpusError for a path or a policy that the source cannot follow. Takes milliseconds."""
        if not isinstance(path, str | None) and not self.several_paths:
            raise CorpusError(f"data.path={list(path)}: must be one path, since this source reads no list")
        if path is not None and not len(path):
            raise CorpusError(f"data.path={path!r}: must be a path, or a list of at least one")
        self.check(path)
        if on_bad_document == "replace" and not self.replaces:
            raise CorpusError(
                "data.on_bad_document=replace: must be error or skip, since this source replaces no bytes"
            )

    def check_evaluated(self) -> None:
        """Raises CorpusError if a trained model cannot be evaluated on the documents, whatever their path."""
        if self.streaming:
            raise CorpusError("data.source.streaming=true: must be false for documents that are evaluated")

    def use_tokenizer(self, tokenizer: "Tokenizer") -> None:
        """Called before `load`. A source whose texts need a certain tokenizer raises CorpusError for others."""
        if not tokenizer.has_text:
            raise CorpusError(
                f"{tokenizer.origin}: must be a tokenizer of text: only files of tokens (data=tokens) have no text"
            )

    @abstractmethod
    def identity(self, path: Paths, cache: Path | None = None) -> dict:
        """Returns plain values that change if the documents change; the fingerprint of the corpus includes them.

        cache: a folder in which the digests of large files are remembered (data/digests.py).
        """

    @abstractmethod
    def load(self, path: Paths, arrow_cache: Path, bad: BadDocuments) -> "dict[str, Dataset]":
        """Returns the documents of each split of SPLITS that has any: rows with the columns `name` and `text`.

        arrow_cache: a folder for the files of `datasets`; it is deleted after the corpus is written.
        bad: counts the documents that cannot be read, or raises CorpusError for the first one (bad_documents.py).
        """

    def load_evaluated(self, path: Paths, arrow_cache: Path, bad: BadDocuments, split: str) -> "list[Dataset]":
        """Returns the rows that are scored where `path` is evaluated by a trained model: those of every split, each
        once. `split` is that of the evaluation, which a source reads alone if it divides each document in time."""
        splits = self.load(path, arrow_cache, bad)
        return list({id(rows): rows for rows in splits.values()}.values())  # validation may serve as test


class GeneratingSource(Source):
    """Generates sequences, in the text of its documents or of a mixture's other sources."""

    @property
    def generating(self) -> "Mapping[str, GeneratingSource]":
        return {"": self}

    @property
    @abstractmethod
    def settings(self) -> Mapping[str, object]:
        """Plain values that change if the sequences change; a run resumes only with those of its checkpoint."""

    @abstractmethod
    def generate(
        self, documents: "Split", tokenizer: "Tokenizer", length: int, generator: np.random.Generator
    ) -> "Batch":
        """Returns a sequence of `length` tokens with the tensors of collation.py, which depends on the state of
        `generator` and the documents alone.

        documents: those of a split, or of the other sources of a mixture.
        """

    @abstractmethod
    def check_length(self, documents: "Split", tokenizer: "Tokenizer", length: int) -> None:
        """Raises CorpusError if `generate` can fail at this length."""

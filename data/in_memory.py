"""Documents in memory, tokenized by an existing tokenizer, for the evaluation of a trained model."""

import hashlib
import tempfile
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from .errors import CorpusError
from .sources import Source
from .tokenizers import Tokenizer
from .tokenizers.base import warn_of_normalized

if TYPE_CHECKING:
    from datasets import Dataset

    from .corpus import Split


class InMemoryDocuments:
    """The documents of `rows` (columns `name` and `text`), with the attributes of a corpus's Split."""

    def __init__(self, rows: "Sequence[dict[str, str]] | Dataset", tokenizer: Tokenizer):
        self.names = [row["name"] for row in rows]
        self._texts = [row["text"] for row in rows]
        self._tokens = [np.concatenate([[tokenizer.bos], tokenizer.encode(text)]) for text in self._texts]
        changed = sum(tokenizer.normalized(text) != text for text in self._texts)
        warn_of_normalized(changed, len(self._texts))
        self.bytes = [len(text.encode()) for text in self._texts]
        self.words = [len(text.split()) for text in self._texts]

    @classmethod
    def load(cls, source: Source, path: str | None, tokenizer: Tokenizer) -> "InMemoryDocuments":
        """Reads all documents of `path` that have text, from every split.

        Raises:
            CorpusError: the path cannot be read, or has no document with text.
        """
        from datasets import concatenate_datasets

        source.check(path)
        with tempfile.TemporaryDirectory() as scratch:
            splits = source.load(path, Path(scratch))
            distinct = {id(rows): rows for rows in splits.values()}  # validation may serve as test
            documents = cls([row for row in concatenate_datasets(list(distinct.values())) if row["text"]], tokenizer)
        if not len(documents):
            raise CorpusError(f"data.path={path}: must hold documents with text, and none was found")
        return documents

    def __len__(self) -> int:
        return len(self.names)

    def tokens(self, document: int) -> np.ndarray:
        """Returns the document's tokens, integers `[tokens]` that begin with bos."""
        return self._tokens[document]

    def text(self, document: int) -> str:
        return self._texts[document]

    @cached_property
    def flat(self) -> np.ndarray:
        """The tokens of all documents in their order."""
        return np.concatenate(self._tokens)

    @property
    def total_tokens(self) -> int:
        return sum(map(len, self._tokens))

    @property
    def total_bytes(self) -> int:
        return sum(self.bytes)


def digest(documents: "Split | InMemoryDocuments") -> str:
    """Returns the sha256 of the texts of all documents in their order. Names and the tokenizer do not change it."""
    found = hashlib.sha256()
    for document in range(len(documents)):
        text = documents.text(document).encode()
        found.update(len(text).to_bytes(8) + text)
    return found.hexdigest()

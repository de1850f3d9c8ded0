"""Documents in memory under a tokenizer that exists already: what one evaluates a trained model on."""

import hashlib
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from .errors import CorpusError
from .sources import Source
from .tokenizers import Tokenizer

if TYPE_CHECKING:
    from datasets import Dataset

    from .corpus import Split


class Texts:
    """Like a Split of a prepared corpus, but in memory: every document of `rows` (columns name and text), tokenized."""

    def __init__(self, rows: "Sequence[dict[str, str]] | Dataset", tokenizer: Tokenizer):
        self.names = [row["name"] for row in rows]
        self._texts = [row["text"] for row in rows]
        self._tokens = [np.concatenate([[tokenizer.bos], tokenizer.encode(text)]) for text in self._texts]
        self.bytes = [len(text.encode()) for text in self._texts]
        self.words = [len(text.split()) for text in self._texts]

    @classmethod
    def load(cls, source: Source, path: str | None, tokenizer: Tokenizer) -> "Texts":
        """All documents that `source` reads from `path`, whatever their split. CorpusError: there are none."""
        import tempfile
        from pathlib import Path

        from datasets import concatenate_datasets

        source.check(path)
        with tempfile.TemporaryDirectory() as scratch:
            splits = source.load(path, Path(scratch))
            distinct = {id(rows): rows for rows in splits.values()}  # validation may serve as test
            texts = cls([row for row in concatenate_datasets(list(distinct.values())) if row["text"]], tokenizer)
        if not len(texts):
            raise CorpusError(f"data.path={path}: must hold documents with text, and none was found")
        return texts

    def __len__(self) -> int:
        return len(self.names)

    def tokens(self, document: int) -> np.ndarray:
        """Integers [tokens of the document], bos first."""
        return self._tokens[document]

    def text(self, document: int) -> str:
        return self._texts[document]

    @cached_property
    def flat(self) -> np.ndarray:
        return np.concatenate(self._tokens)

    @property
    def total_tokens(self) -> int:
        return sum(map(len, self._tokens))

    @property
    def total_bytes(self) -> int:
        return sum(self.bytes)


def digest(documents: "Split | Texts") -> str:
    """sha256 over the texts of all documents in their order. Names and the tokenizer do not change it."""
    found = hashlib.sha256()
    for document in range(len(documents)):
        text = documents.text(document).encode()
        found.update(len(text).to_bytes(8) + text)
    return found.hexdigest()

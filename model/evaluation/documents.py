"""The interface of documents that can be evaluated."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np


class Documents(Protocol):
    """Tokenized documents, as data.corpus.Split and data.in_memory.InMemoryDocuments are."""

    bytes: Sequence[int]
    """Length of each document's text in UTF-8."""
    words: Sequence[int]
    """Number of words of each document's text, separated by white space."""

    def __len__(self) -> int: ...

    def tokens(self, document: int) -> np.ndarray:
        """Integers [tokens of the document], the beginning-of-document token first."""
        ...

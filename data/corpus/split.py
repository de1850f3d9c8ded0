"""The documents of one split of a corpus."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..sources.file_rows import names_of, texts_of

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass
class SplitMetadata:
    """The numbers of documents, of tokens (bos included) and of bytes of text in a split. Documents shorter than
    `data.minimum_tokens` are dropped from it and counted separately."""

    documents: int
    tokens: int
    bytes: int
    dropped_short: int
    content: str  # sha256 of tokens.bin
    dropped_tokens: int | None = None  # of the short documents; None in corpora of earlier versions
    dropped_bytes: int | None = None


class Split:
    """The documents of one split. A pickled copy is small: each process opens the files itself."""

    def __init__(self, folder: Path, metadata: SplitMetadata, dtype: str):
        self.folder = folder
        self.metadata = metadata
        self.dtype = dtype
        self.total_tokens = metadata.tokens
        self.total_bytes = metadata.bytes

    def __len__(self) -> int:
        return self.metadata.documents

    def tokens(self, document: int) -> np.ndarray:
        """Returns the document's tokens, integers `[tokens]` that begin with bos: a view of the memory-mapped file."""
        return self.flat[self.offsets[document] : self.offsets[document + 1]]

    def text(self, document: int) -> str:
        return self.documents[document]["text"]

    def raw(self, document: int) -> bytes:
        """Returns the bytes of the document's text. Those of a token file may not be UTF-8."""
        return self.text(document).encode()

    @property
    def texts(self) -> "Split":
        """The documents in which sources generate their sequences."""
        return self

    def head(self, tokens: int) -> np.ndarray:
        """Returns the first tokens of the split."""
        return self.flat[:tokens]

    @cached_property
    def flat(self) -> np.ndarray:
        """The concatenated tokens of all documents, memory-mapped."""
        mapped = np.memmap(self.folder / "tokens.bin", dtype=self.dtype, mode="r")
        return np.asarray(mapped)  # a slice of an array takes a fraction of the time

    @cached_property
    def offsets(self) -> np.ndarray:
        """int64 `[documents + 1]`: where each document starts in `flat`, and the end."""
        return np.load(self.folder / "offsets.npy", allow_pickle=False)

    @cached_property
    def bytes(self) -> np.ndarray:
        """int64 `[documents]`: UTF-8 bytes of each text."""
        return np.load(self.folder / "bytes.npy", allow_pickle=False)

    @cached_property
    def words(self) -> list[int]:
        """The number of words, separated by white space, of each document."""
        return [len(text.split()) for text in texts_of(self.documents)]

    @cached_property
    def lengths(self) -> np.ndarray:
        """int64 `[documents]`: tokens of each document, bos included."""
        return np.diff(self.offsets)

    @cached_property
    def names(self) -> list[str]:
        return list(names_of(self.documents))

    @cached_property
    def documents(self) -> "Dataset":
        from datasets import load_from_disk

        return load_from_disk(str(self.folder / "documents"))

    def __getstate__(self) -> dict:
        kept = ("folder", "metadata", "dtype", "total_tokens", "total_bytes")
        return {key: value for key, value in vars(self).items() if key in kept}

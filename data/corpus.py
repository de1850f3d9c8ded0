"""The tokenised corpus on disk, as preparation.py wrote it: opened in a moment.

A corpus is a folder, named after a fingerprint of everything that made it (the files read, the tokenizer's settings,
the filter), so another setting is another folder and nothing is ever stale:

    .cache/data/<fingerprint>/
      metadata.json      what was made and from what, and the size of every other file
      tokenizer.json
      train/             (validation/ and test/ alike)
        tokens.bin       every document's [bos] + tokens, end to end; uint16, or uint32 for large vocabularies
        offsets.npy      int64 [documents + 1], where each document starts in tokens.bin
        bytes.npy        int64 [documents], UTF-8 bytes of each document's text
        documents/       the documents themselves, an Arrow table of name and text

Opening reads the metadata and compares sizes; tokens are memory-mapped, and the Arrow table is opened by who asks for a
document's text or name.
"""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from . import tokenizers
from .errors import CorpusError

if TYPE_CHECKING:
    import rich.table
    from datasets import Dataset

LONG = (1024, 4096, 16384, 65536)  # tokens: the report says how much of the corpus is in documents at least that long


@dataclass
class SplitMetadata:
    documents: int
    tokens: int
    bytes: int
    dropped_short: int
    content: str  # sha256 of tokens.bin


class Split:
    """The documents of one split. Cheap to copy to worker processes: what is on disk is opened where it is used."""

    def __init__(self, folder: Path, metadata: SplitMetadata, dtype: str):
        self.folder = folder
        self.metadata = metadata
        self.dtype = dtype
        self.total_tokens = metadata.tokens
        self.total_bytes = metadata.bytes

    def __len__(self) -> int:
        return self.metadata.documents

    def tokens(self, document: int) -> np.ndarray:
        """Integers [tokens of the document], bos first; a view of the memory-mapped file."""
        return self.flat[self.offsets[document] : self.offsets[document + 1]]

    def text(self, document: int) -> str:
        return self.documents[document]["text"]

    @cached_property
    def flat(self) -> np.ndarray:
        return np.memmap(self.folder / "tokens.bin", dtype=self.dtype, mode="r")

    @cached_property
    def offsets(self) -> np.ndarray:
        return np.load(self.folder / "offsets.npy", allow_pickle=False)

    @cached_property
    def bytes(self) -> np.ndarray:
        return np.load(self.folder / "bytes.npy", allow_pickle=False)

    @cached_property
    def words(self) -> list[int]:
        """Of each document, separated by white space."""
        return [len(text.split()) for text in self.documents["text"]]

    @cached_property
    def lengths(self) -> np.ndarray:
        """int64 [documents]: tokens of each, bos included."""
        return np.diff(self.offsets)

    @cached_property
    def names(self) -> list[str]:
        return list(self.documents["name"])

    @cached_property
    def documents(self) -> "Dataset":
        from datasets import load_from_disk

        return load_from_disk(str(self.folder / "documents"))

    def __getstate__(self) -> dict:
        kept = ("folder", "metadata", "dtype", "total_tokens", "total_bytes")
        return {key: value for key, value in vars(self).items() if key in kept}


class Corpus:
    """A prepared corpus: `splits`, the `tokenizer` that made it, and the `fingerprint` that names it."""

    def __init__(self, folder: Path):
        """Open a folder that `prepare` wrote. Raises CorpusError where it is not complete."""
        try:
            metadata = json.loads((folder / "metadata.json").read_text())
            sizes = {name: (folder / name).stat().st_size for name in metadata["sizes"]}
        except (OSError, ValueError, KeyError) as error:
            raise CorpusError(f"{folder}: not a complete corpus ({error})") from error
        for name, size in metadata["sizes"].items():
            if sizes[name] != size:
                raise CorpusError(f"{folder / name}: has {sizes[name]} bytes instead of {size}")
        self.folder = folder
        self.fingerprint: str = metadata["fingerprint"]
        self.tokenizer = tokenizers.load(folder / "tokenizer.json")
        self.splits = {
            split: Split(folder / split, SplitMetadata(**found), metadata["dtype"])
            for split, found in metadata["splits"].items()
        }

    @property
    def contents(self) -> dict[str, str]:
        """sha256 of each split's tokens: equal for equal documents under one tokenizer, wherever they lie."""
        return {name: split.metadata.content for name, split in self.splits.items()}

    def report(self) -> "rich.table.Table":
        """Documents, bytes, tokens and the distribution of lengths, a row a split."""
        from rich.table import Table

        table = Table(title=f"corpus {self.fingerprint[:12]}, vocabulary {self.tokenizer.vocabulary:,}")
        for column in ("split", "documents", "dropped", "MB", "tokens", "bytes/token", "shortest", "median", "longest"):
            table.add_column(column, justify="left" if column == "split" else "right")
        for length in LONG:
            table.add_column(f"in ≥{length // 1024}k", justify="right")
        for name, split in self.splits.items():
            lengths = split.lengths
            table.add_row(
                name,
                f"{len(split):,}",
                f"{split.metadata.dropped_short:,}",
                f"{split.total_bytes / 1e6:,.2f}",
                f"{split.total_tokens:,}",
                f"{split.total_bytes / split.total_tokens:.2f}",
                *(f"{int(tokens):,}" for tokens in (lengths.min(), np.median(lengths), lengths.max())),
                *(f"{lengths[lengths >= length].sum() / split.total_tokens:.0%}" for length in LONG),
            )
        table.caption = "lengths in tokens; “in ≥4k”: share of the tokens that are in documents of at least 4,096"
        return table

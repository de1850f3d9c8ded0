"""A tokenized corpus on disk, as ../preparation/corpus_writer.py writes it.

A corpus is a folder whose name is a fingerprint of everything that it was made from: the files, the tokenizer's
settings, the filter. So other settings give another folder, and no folder is out of date.

    .cache/data/<fingerprint>/
      metadata.json      the settings, the counts of each split, the size of every other file, and most digests
      tokenizer.json
      train/             (validation/ and test/ have the same files)
        tokens.bin       [bos] + tokens of every document, end to end; uint16, or uint32 for large vocabularies. If
                         they have more than 16 GiB: tokens-00000.bin, tokens-00001.bin, ... of whole documents
        offsets.npy      int64 [documents + 1], the index in tokens.bin at which each document starts
        bytes.npy        int64 [documents], UTF-8 bytes of each document's text
        documents/       an Arrow table with the name and the text of each document

To open a corpus, its metadata is read, file sizes are compared, and all files but the documents are compared with their
sha256: more than 1 GB a second, and only once for files that do not change (digests.py). Tokens are memory-mapped. The
Arrow table is opened when a text or a name is first needed.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..digests import FILE as DIGESTS
from ..digests import digests_of
from ..errors import CorpusError
from ..tokenizers import load
from .split import Split, SplitMetadata
from .token_files import Shard, ShardedSplit, SplitOfFiles

if TYPE_CHECKING:
    import rich.table

SEVERAL = "tokens-"
"""The names of a split's token files begin with it, if there are several."""

LONG = (1024, 4096, 16384, 65536)
"""Lengths in tokens; the report gives the share of the corpus in documents at least that long."""


def _check_contents(folder: Path, metadata: dict) -> None:
    """Raises CorpusError if tokens, offsets or the tokenizer are not those that were written. Corpora of earlier
    versions have the digest of the tokens alone."""
    in_place = "shards" in metadata  # the token files are elsewhere, and the fingerprint includes their digests
    expected = {f"{split}/tokens.bin": saved["content"] for split, saved in metadata["splits"].items() if not in_place}
    expected = {name: digest for name, digest in expected.items() if name in metadata["sizes"]}
    expected |= metadata.get("digests", {})
    found = digests_of([folder / name for name in expected], folder / DIGESTS)
    for (name, digest), other in zip(expected.items(), found, strict=True):
        if other != digest:
            raise CorpusError(f"{folder / name}: has another content than was written (sha256 {other[:12]}...)")


class Corpus:
    """A prepared corpus.

    splits: a Split by its name. tokenizer: the one that encoded them. fingerprint: the name of the folder.
    skipped: the count and the places of documents that were skipped or repaired (`BadDocuments.summary`); None if
        there were none.
    """

    def __init__(self, folder: Path):
        """Opens a folder that `prepare` wrote. Raises CorpusError if a file is missing or was changed."""
        try:
            metadata = json.loads((folder / "metadata.json").read_text())
            sizes = {name: (folder / name).stat().st_size for name in metadata["sizes"]}
        except (OSError, ValueError, KeyError) as error:
            raise CorpusError(f"{folder}: not a complete corpus ({error})") from error
        for name, size in metadata["sizes"].items():
            if sizes[name] != size:
                raise CorpusError(f"{folder / name}: has {sizes[name]} bytes instead of {size}")
        _check_contents(folder, metadata)
        self.folder = folder
        self.fingerprint: str = metadata["fingerprint"]
        self.skipped: dict | None = metadata.get("skipped")
        self.tokenizer = load(folder / "tokenizer.json")
        self.splits = {split: self._split(split, saved, metadata) for split, saved in metadata["splits"].items()}

    def _split(self, name: str, saved: dict, metadata: dict) -> Split:
        if "shards" in metadata:
            shards = [Shard(**shard) for shard in metadata["shards"][name]]
            return ShardedSplit(self.folder / name, SplitMetadata(**saved), shards, self.tokenizer)
        files = sorted(file for file in metadata["sizes"] if file.startswith(f"{name}/{SEVERAL}"))
        if files:
            dtype, size = metadata["dtype"], np.dtype(metadata["dtype"]).itemsize
            shards = [Shard(str(self.folder / file), dtype, 0, metadata["sizes"][file] // size) for file in files]
            return SplitOfFiles(self.folder / name, SplitMetadata(**saved), shards)
        return Split(self.folder / name, SplitMetadata(**saved), metadata["dtype"])

    @property
    def contents(self) -> dict[str, str]:
        """The sha256 of each split's tokens. It depends on the documents and the tokenizer, not on paths or dates."""
        return {name: split.metadata.content for name, split in self.splits.items()}

    def report(self) -> "rich.table.Table":
        """Returns a table with the documents, bytes, tokens and lengths of each split. Bytes are left out where losses
        are not given per byte."""
        from rich.table import Table

        table = Table(title=f"corpus {self.fingerprint[:12]}, vocabulary {self.tokenizer.vocabulary:,}")
        bytes_, per_token = (["MB"], ["bytes/token"]) if self.tokenizer.per_byte else ([], [])
        lengths = ("shortest", "median", "longest")
        for column in ("split", "documents", "dropped", *bytes_, "tokens", *per_token, *lengths):
            table.add_column(column, justify="left" if column == "split" else "right")
        for length in LONG:
            table.add_column(f"in ≥{length // 1024}k", justify="right")
        for name, split in self.splits.items():
            lengths = split.lengths
            table.add_row(
                name,
                f"{len(split):,}",
                f"{split.metadata.dropped_short:,}",
                *(f"{split.total_bytes / 1e6:,.2f}" for _ in bytes_),
                f"{split.total_tokens:,}",
                *(f"{split.total_bytes / split.total_tokens:.2f}" for _ in per_token),
                *(f"{int(tokens):,}" for tokens in (lengths.min(), np.median(lengths), lengths.max())),
                *(f"{lengths[lengths >= length].sum() / split.total_tokens:.0%}" for length in LONG),
            )
        table.caption = "lengths in tokens; “in ≥4k”: share of the tokens that are in documents of at least 4,096"
        return table

"""The corpus of a mixture with token files: the corpora of its sources, one after another.

Token files stay where they are, with a corpus of their own in the cache (../preparation/shard_index.py), which
`data=tokens` alone opens, too. All other sources of the mixture share one corpus.
"""

import hashlib
import json
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path

import numpy as np

from ..sources.mixture import NO_NAME
from .corpus import Corpus
from .split import Split, SplitMetadata


class JoinedSplit(Split):
    """The documents of several splits, one split after another.

    parts: the splits, by the name that their documents' names begin with; NO_NAME where these have it already.
    """

    def __init__(self, name: str, parts: Mapping[str, Split]):
        metadata = [split.metadata for split in parts.values()]
        content = json.dumps([[source, split.metadata.content] for source, split in parts.items()])
        super().__init__(
            Path(name),
            SplitMetadata(
                documents=sum(each.documents for each in metadata),
                tokens=sum(each.tokens for each in metadata),
                bytes=sum(each.bytes for each in metadata),
                dropped_short=sum(each.dropped_short for each in metadata),
                content=hashlib.sha256(content.encode()).hexdigest(),
                dropped_tokens=sum(each.dropped_tokens or 0 for each in metadata),
                dropped_bytes=sum(each.dropped_bytes or 0 for each in metadata),
            ),
            "uint32",
        )
        self.parts = dict(parts)
        self.splits = list(parts.values())
        self.first = np.cumsum([0, *map(len, self.splits)])
        """The number of each part's first document."""

    @property
    def texts(self) -> Split:
        return self.parts[NO_NAME]

    def _place(self, document: int) -> tuple[Split, int]:
        number = int(np.searchsorted(self.first, document, side="right")) - 1
        return self.splits[number], int(document - self.first[number])

    def tokens(self, document: int) -> np.ndarray:
        split, index = self._place(document)
        return split.tokens(index)

    def text(self, document: int) -> str:
        split, index = self._place(document)
        return split.text(index)

    def raw(self, document: int) -> bytes:
        split, index = self._place(document)
        return split.raw(index)

    def head(self, tokens: int) -> np.ndarray:
        """Returns the first tokens of each part, in the parts' shares of all tokens."""
        tokens = min(tokens, self.total_tokens)
        return np.concatenate([split.head(tokens * split.total_tokens // self.total_tokens) for split in self.splits])

    @property
    def flat(self) -> np.ndarray:
        """The concatenated tokens of all documents, which are copied into memory."""
        return np.concatenate([split.flat for split in self.splits])

    @cached_property
    def offsets(self) -> np.ndarray:
        lengths = np.concatenate([split.lengths for split in self.splits])
        return np.append(0, np.cumsum(lengths))

    @cached_property
    def bytes(self) -> np.ndarray:
        return np.concatenate([split.bytes for split in self.splits])

    @cached_property
    def words(self) -> list[int]:
        return [count for split in self.splits for count in split.words]

    @cached_property
    def names(self) -> list[str]:
        return [
            name if source == NO_NAME else f"{source}/{name}"
            for source, split in self.parts.items()
            for name in split.names
        ]

    def __getstate__(self) -> dict:
        return super().__getstate__() | {"parts": self.parts, "splits": self.splits, "first": self.first}


class JoinedCorpus(Corpus):
    """Several corpora of one tokenizer as one.

    parts: the corpora, by the name that their documents' names begin with; NO_NAME where these have it already.
    """

    def __init__(self, parts: Mapping[str, Corpus]):
        first = next(iter(parts.values()))
        self.folder = first.folder
        self.tokenizer = first.tokenizer
        self.skipped = None  # each of the parts is reported when it is opened
        fingerprints = json.dumps([[name, corpus.fingerprint] for name, corpus in parts.items()])
        self.fingerprint = hashlib.sha256(fingerprints.encode()).hexdigest()[:32]
        self.splits = {
            split: JoinedSplit(split, {name: corpus.splits[split] for name, corpus in parts.items()})
            for split in first.splits
        }

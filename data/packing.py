"""Packing: documents to sequences of one length.

    contiguous   the documents of a split in a seeded order, end to end, cut every `sequence_length` tokens
    whole        one document per sequence; a longer one continues in the next sequences, a shorter one is padded

No target lies in another document than the tokens before it. No token is dropped: each token of the split but bos is a
target exactly once. A sequence has four tensors:

    tokens, targets    int64 [sequence_length]; a target is the next token, or -100 for none
    document           int32 [sequence_length]; 0, 1, 2, ... for the documents in the sequence; padding is one more
    position           int32 [sequence_length]; 0, 1, 2, ... from the document's first token in the sequence
"""

from bisect import bisect
from collections.abc import Iterator

import numpy as np
import torch
from torch.utils.data import ConcatDataset, Dataset

from .corpus import Split
from .errors import CorpusError

NO_TARGET = -100  # torch's cross_entropy ignores it by default

Batch = dict[str, torch.Tensor]
"""The tensors of a sequence, or those of several sequences with a first dimension more."""


class Contiguous(Dataset):
    """A split's documents end to end, cut every `sequence_length` tokens.

    seed: shuffles the documents; None keeps the order of the split. Their places take 16 bytes of memory a document.
    multiple: the number of sequences is a multiple of it; those behind the last token are padding.
    """

    def __init__(self, split: Split, sequence_length: int, bos: int, seed: int | None, multiple: int = 1):
        self.split = split
        self.multiple = multiple
        self.sequence_length = sequence_length
        self.bos = bos
        self.order = np.arange(len(split))
        if seed is not None:
            np.random.default_rng(seed).shuffle(self.order)
        self.starts = np.concatenate([[0], np.cumsum(split.lengths[self.order])])  # of the documents, in tokens

    def __len__(self) -> int:
        # The very last token is only a target. The last sequence may be short, and is padded.
        return -(-(self.split.total_tokens - 1) // (self.sequence_length * self.multiple)) * self.multiple

    def __getitem__(self, index: int) -> Batch:
        return assemble(self._pieces(index), self.sequence_length, self.bos)

    def documents(self, index: int) -> list[int]:
        """Returns the numbers, within the split, of the documents in a sequence."""
        return [int(self.order[place]) for place in self._places(index)]

    def _pieces(self, index: int) -> Iterator[np.ndarray]:
        """Yields each document's tokens in the sequence, and with the last one the target of the last token."""
        start, stop = self._range(index)
        for place in self._places(index):
            offset = self.starts[place]
            yield self.split.tokens(self.order[place])[max(0, start - offset) : stop - offset]

    def _range(self, index: int) -> tuple[int, int]:
        start, tokens = index * self.sequence_length, self.split.total_tokens
        return min(start, tokens), min(start + self.sequence_length + 1, tokens)

    def _places(self, index: int) -> range:
        start, stop = self._range(index)
        first = np.searchsorted(self.starts, start, side="right") - 1
        return range(first, np.searchsorted(self.starts, stop, side="left"))


class Whole(Dataset):
    """One document per sequence; a document that does not fit continues in the next sequences."""

    def __init__(self, split: Split, sequence_length: int, bos: int, seed: int | None):
        self.split = split
        self.sequence_length = sequence_length
        self.bos = bos
        counts = -(-(split.lengths - 1) // sequence_length)  # a document's last token is only a target
        self.first = np.concatenate([[0], np.cumsum(counts)])  # sequence of each document

    def __len__(self) -> int:
        return int(self.first[-1])

    def documents(self, index: int) -> list[int]:
        """Returns the number, within the split, of the document in a sequence."""
        return [int(np.searchsorted(self.first, index, side="right") - 1)]

    def __getitem__(self, index: int) -> Batch:
        (document,) = self.documents(index)
        start = (index - self.first[document]) * self.sequence_length
        piece = self.split.tokens(document)[start : start + self.sequence_length + 1]
        return assemble([piece], self.sequence_length, self.bos)


class SeveralLengths(ConcatDataset):
    """The sequences of several lengths of one split: all of the first length, then all of the second, ..."""

    def documents(self, index: int) -> list[int]:
        """Returns the numbers, within the split, of the documents in a sequence."""
        number = bisect(self.cumulative_sizes, index)
        return self.datasets[number].documents(index - [0, *self.cumulative_sizes][number])


PACKINGS = {"contiguous": Contiguous, "whole": Whole}


def assemble(pieces: Iterator[np.ndarray] | list[np.ndarray], length: int, pad: int) -> Batch:
    """Returns a sequence of pieces of documents, filled up with `pad`.

    The pieces have at most `length + 1` tokens in all; token `length + 1` is only a target.
    """
    pieces = list(pieces)
    sizes = [len(piece) for piece in pieces]
    missing = length + 1 - sum(sizes)
    if missing:
        pieces.append(np.full(missing, pad))
        sizes.append(missing)
    tokens = np.concatenate(pieces).astype(np.int64)
    document = np.repeat(np.arange(len(sizes), dtype=np.int32), sizes)
    first = np.repeat(np.cumsum([0, *sizes[:-1]]), sizes)
    position = (np.arange(length + 1) - first).astype(np.int32)
    targets = np.where(document[1:] == document[:-1], tokens[1:], NO_TARGET)
    if missing:
        targets[document[:-1] == document[-1]] = NO_TARGET
    sequence = {"tokens": tokens[:-1], "targets": targets, "document": document[:-1], "position": position[:-1]}
    return {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in sequence.items()}


def pack(packing: str, split: Split, sequence_length: int, bos: int, seed: int | None = None) -> Contiguous | Whole:
    """Returns a split's sequences as a map-style dataset. Raises CorpusError for an unknown packing."""
    if packing not in PACKINGS:
        raise CorpusError(f"data.packing={packing}: must be {' or '.join(PACKINGS)}")
    return PACKINGS[packing](split, sequence_length, bos, seed)

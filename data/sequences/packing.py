"""Packing: documents to sequences of one length.

    contiguous   the documents of a split in a seeded order, end to end, cut every `sequence_length` tokens
    whole        one document per sequence; a longer one continues in the next sequences, a shorter one is padded
    best_fit     several documents per sequence, chosen to fill it; only documents longer than a sequence are cut

A target never belongs to another document than the token before it. Every token of the split except bos is a target
exactly once, so no token is dropped. collation.py lists the tensors of a sequence.
"""

import logging
from abc import ABC, abstractmethod
from bisect import bisect
from collections.abc import Iterator, Mapping

import numpy as np
from torch.utils.data import ConcatDataset, Dataset

from ..collation import Batch, Packed, row_of
from ..corpus import Split
from ..errors import CorpusError
from .best_fit import best_fit_decreasing

log = logging.getLogger(__name__)


class SplitSubset:
    """A selection of a split's documents, with the attributes of a Split that packing reads.

    documents: the indices of the documents in `split`; a document is read as often as its index occurs. `numbers` are
        their indices in the whole split, also if `split` is a subset of it.
    """

    def __init__(self, split: "Split | SplitSubset", documents: np.ndarray):
        self.split = split
        self.numbers = split.numbers[documents] if isinstance(split, SplitSubset) else documents
        self.documents = documents
        self.lengths = split.lengths[documents]
        self.total_tokens = int(self.lengths.sum())

    def __len__(self) -> int:
        return len(self.documents)

    def tokens(self, document: int) -> np.ndarray:
        return self.split.tokens(self.documents[document])


def weighted(split: Split | SplitSubset, weights: Mapping[int, int]) -> SplitSubset:
    """Returns a split in which long documents are read several times.

    weights: `{length: times}`; documents of at least `length` tokens are read `times` times. The greatest such length
        decides. Documents shorter than all lengths are read once.
    """
    lengths = sorted(weights)
    times = np.array([1, *(weights[length] for length in lengths)])
    times = times[np.searchsorted(lengths, split.lengths, side="right")]
    return SplitSubset(split, np.repeat(np.arange(len(split)), times))


class PackedSequences(Dataset, ABC):
    """The sequences of a split. An item is a dict of tensors; a DataLoader reads token arrays (`__getitems__`)."""

    def __init__(self, split: Split | SplitSubset, sequence_length: int, bos: int, document_mask: bool):
        self.split = split
        self.numbers = split.numbers if isinstance(split, SplitSubset) else np.arange(len(split))
        self.sequence_length = sequence_length
        self.bos = bos
        self.document_mask = document_mask

    @abstractmethod
    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Batch:
        return row_of(self.packed(index))

    def __getitems__(self, indices: list[int]) -> list[Packed]:
        return [self.packed(index) for index in indices]

    def packed(self, index: int) -> Packed:
        pieces = list(self._pieces(index)) or [np.empty(0, np.int64)]
        sizes = [len(piece) for piece in pieces]
        return Packed(np.concatenate(pieces), sizes, self.sequence_length, self.bos, self.document_mask)

    def documents(self, index: int) -> list[int]:
        """Returns the indices in the whole split of the documents in a sequence."""
        return self.numbers[self._documents(index)].tolist()

    @abstractmethod
    def _documents(self, index: int) -> list[int]:
        """Returns the indices in `split` of the documents in a sequence."""

    @abstractmethod
    def _pieces(self, index: int) -> Iterator[np.ndarray]:
        """Yields the tokens of each document in a sequence: `sequence_length + 1` in all, of which the last one is only
        a target, or fewer where the sequence has padding."""


class Contiguous(PackedSequences):
    """A split's documents end to end, cut every `sequence_length` tokens.

    The dataset takes 24 bytes of memory a document.

    seed: shuffles the documents; None keeps the order of the split.
    multiple: the number of sequences is rounded up to a multiple of it; sequences after the last token are padding.
    """

    def __init__(
        self,
        split: Split | SplitSubset,
        sequence_length: int,
        bos: int,
        seed: int | None,
        document_mask: bool = True,
        multiple: int = 1,
    ):
        super().__init__(split, sequence_length, bos, document_mask)
        self.multiple = multiple
        self.order = np.arange(len(split))
        if seed is not None:
            np.random.default_rng(seed).shuffle(self.order)
        self.starts = np.concatenate([[0], np.cumsum(split.lengths[self.order])])  # of the documents, in tokens

    def __len__(self) -> int:
        # The very last token is only a target. The last sequence may be short, and is padded.
        return -(-(self.split.total_tokens - 1) // (self.sequence_length * self.multiple)) * self.multiple

    def _documents(self, index: int) -> list[int]:
        return [int(self.order[place]) for place in self._places(index)]

    def _pieces(self, index: int) -> Iterator[np.ndarray]:
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


class Whole(PackedSequences):
    """One document per sequence; a document that does not fit continues in the next sequences."""

    def __init__(
        self, split: Split | SplitSubset, sequence_length: int, bos: int, seed: int | None, document_mask: bool = True
    ):
        super().__init__(split, sequence_length, bos, document_mask)
        counts = -(-(split.lengths - 1) // sequence_length)  # a document's last token is only a target
        self.first = np.concatenate([[0], np.cumsum(counts)])  # sequence of each document

    def __len__(self) -> int:
        return int(self.first[-1])

    def _documents(self, index: int) -> list[int]:
        return [int(np.searchsorted(self.first, index, side="right") - 1)]

    def _pieces(self, index: int) -> Iterator[np.ndarray]:
        (document,) = self._documents(index)
        start = (index - self.first[document]) * self.sequence_length
        yield self.split.tokens(document)[start : start + self.sequence_length + 1]


class BestFit(PackedSequences):
    """Several whole documents per sequence, placed by best-fit decreasing (best_fit.py).

    Only a document of more than `sequence_length + 1` tokens is cut: into full sequences and a rest, which is placed
    like a document. The room that remains in a sequence is padding; the log reports its share. Copies of a document lie
    in different sequences.

    seed: determines the order of documents of equal length, and of those within a sequence; None keeps the split's.
    """

    def __init__(
        self, split: Split | SplitSubset, sequence_length: int, bos: int, seed: int | None, document_mask: bool = True
    ):
        super().__init__(split, sequence_length, bos, document_mask)
        documents = np.flatnonzero(split.lengths > 1)  # bos alone has no target
        if seed is not None:
            np.random.default_rng(seed).shuffle(documents)
        _, first, each = np.unique(self.numbers[documents], return_index=True, return_inverse=True)
        documents = documents[np.argsort(first[each], kind="stable")]  # copies of a document follow one another
        full = (split.lengths[documents] - 2) // sequence_length  # sequences of a document before its rest
        rests = split.lengths[documents] - full * sequence_length  # at least 2, at most sequence_length + 1
        bins = best_fit_decreasing(rests, sequence_length + 1, self.numbers[documents])
        held = np.bincount(bins, rests).astype(np.int64)  # tokens in each sequence of rests
        sequence = np.concatenate([bins, len(held) + np.arange(full.sum())])
        start = np.concatenate([full, np.arange(full.sum()) - np.repeat(np.cumsum(full) - full, full)])
        order = np.argsort(sequence, kind="stable")
        self.piece_documents = np.concatenate([documents, np.repeat(documents, full)])[order]
        self.piece_starts = start[order] * sequence_length
        self.first = np.concatenate([[0], np.cumsum(np.bincount(sequence))])  # piece of each sequence
        padding = np.maximum(0, sequence_length - held).sum() / max(1, len(self) * sequence_length)
        log.info(
            f"data.packing=best_fit: {len(documents):,} documents in {len(self):,} sequences, {padding:.2%} padding;"
            f" {np.count_nonzero(full):,} longer than a sequence, and cut"
        )

    def __len__(self) -> int:
        return len(self.first) - 1

    def _documents(self, index: int) -> list[int]:
        return self.piece_documents[self.first[index] : self.first[index + 1]].tolist()

    def _pieces(self, index: int) -> Iterator[np.ndarray]:
        starts = self.piece_starts[self.first[index] : self.first[index + 1]].tolist()
        for document, start in zip(self._documents(index), starts, strict=True):
            yield self.split.tokens(document)[start : start + self.sequence_length + 1]


class SeveralLengths(ConcatDataset):
    """The sequences of several lengths of one split: all of the first length, then all of the second, ..."""

    def __getitems__(self, indices: list[int]) -> list[Packed | Batch]:
        return [sequence for index in indices for sequence in items(*self._place(index))]

    def documents(self, index: int) -> list[int]:
        """Returns the indices in the split of the documents in a sequence."""
        dataset, index = self._place(index)
        return dataset.documents(index)

    def _place(self, index: int) -> tuple[Dataset, int]:
        number = bisect(self.cumulative_sizes, index)
        return self.datasets[number], index - [0, *self.cumulative_sizes][number]


PACKINGS = {"contiguous": Contiguous, "whole": Whole, "best_fit": BestFit}


def items(dataset: Dataset, index: int) -> list[Packed | Batch]:
    """Returns a list of the one item `index`, as a DataLoader reads it: token arrays if the dataset has them."""
    return dataset.__getitems__([index]) if hasattr(dataset, "__getitems__") else [dataset[index]]


def pack(
    packing: str,
    split: Split | SplitSubset,
    sequence_length: int,
    bos: int,
    seed: int | None = None,
    document_mask: bool = True,
) -> PackedSequences:
    """Returns a split's sequences as a map-style dataset. Raises CorpusError for an unknown packing."""
    if packing not in PACKINGS:
        raise CorpusError(f"data.packing={packing}: must be {', '.join(PACKINGS)}")
    return PACKINGS[packing](split, sequence_length, bos, seed, document_mask)

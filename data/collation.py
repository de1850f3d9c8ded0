"""Collation: the token arrays of sequences to a batch of tensors.

A batch is a dict of tensors `[batch, sequence_length]`:

    tokens, targets    int64; a target is the next token, or -100 for none
    document           int32; 0, 1, 2, ... for the documents in the sequence; padding is one more
    position           int32; 0, 1, 2, ... from the document's first token in the sequence

Without a document mask, `document` is 0 and `position` goes on over the documents of a sequence: attention and
positions cross from one document into the next. The targets stay the same: no target is a document's first token.

A worker process sends token arrays, which have a twelfth of a batch's bytes, so it needs no shared memory. The process
that receives them makes the tensors.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import default_collate, get_worker_info

NO_TARGET = -100  # torch's cross_entropy ignores it by default

Batch = dict[str, torch.Tensor]
"""The tensors of one sequence `[length]`, or of several `[batch, length]`."""


class Packed(NamedTuple):
    """A sequence as an array of tokens.

    tokens: integers of any type `[at most length + 1]`: pieces of documents, end to end. Token `length + 1` is only a
        target.
    sizes: the number of tokens of each piece.
    length: the number of tokens of the sequence.
    pad: the token of padding.
    document_mask: whether each piece gets its own value of `document`; False gives all the same one.
    """

    tokens: np.ndarray
    sizes: list[int]
    length: int
    pad: int
    document_mask: bool


def expand(samples: Sequence[Packed]) -> Batch:
    """Returns the batch of sequences of one length.

    Its tensors are views of one allocation, which the allocator keeps and reuses for the next batch. It would return
    several smaller ones to the system, and fresh pages take four times as long to fill.
    """
    shape = len(samples), samples[0].length
    wide = np.empty((3, *shape), np.int64)
    narrow = wide[2].view(np.int32).reshape(2, *shape)
    batch = dict(tokens=wide[0], targets=wide[1], document=narrow[0], position=narrow[1])
    for row, sample in enumerate(samples):
        _fill(sample, **{name: array[row] for name, array in batch.items()})
    return {name: torch.from_numpy(array) for name, array in batch.items()}


def _fill(sample: Packed, tokens: np.ndarray, targets: np.ndarray, document: np.ndarray, position: np.ndarray) -> None:
    length, count = sample.length, len(sample.tokens)
    scored = max(count - 1, 0)
    tokens[:count] = sample.tokens[:length]
    tokens[count:] = sample.pad
    targets[:scored] = sample.tokens[1:]
    targets[scored:] = NO_TARGET
    targets[np.cumsum(sample.sizes[:-1], dtype=np.int64) - 1] = NO_TARGET
    sizes = [*(sample.sizes if sample.document_mask else [count]), length + 1 - count]
    sizes = np.array([size for size in sizes if size])
    document[:] = np.repeat(np.arange(len(sizes), dtype=np.int32), sizes)[:length]
    starts = (np.cumsum(sizes) - sizes).astype(np.int32)
    np.subtract(_count(length), np.repeat(starts, sizes)[:length], out=position)


@lru_cache(maxsize=4)
def _count(length: int) -> np.ndarray:
    return np.arange(length, dtype=np.int32)


class _Sent(list):
    """The samples of a batch in a worker. The process that unpickles them gets the batch."""

    def __reduce__(self):
        return expand, (list(self),)


def collate(samples: "list[Packed | Batch]") -> "Batch | _Sent":
    """Returns the batch of samples of one length, for a DataLoader: token arrays, or dicts of tensors."""
    if not all(isinstance(sample, Packed) for sample in samples):
        samples = [row_of(sample) if isinstance(sample, Packed) else sample for sample in samples]
        return default_collate(samples)
    return expand(samples) if get_worker_info() is None else _Sent(samples)


def row_of(sample: Packed) -> Batch:
    """Returns the tensors `[length]` of a sequence."""
    return {name: tensor[0] for name, tensor in expand([sample]).items()}

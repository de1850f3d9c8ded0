"""One layer's keys and values in the slots that their pattern's bookkeeping gives them."""

from collections.abc import Sequence

import torch
from torch import Tensor

from kernels import BlockLayout
from kernels.decoding import Part
from model.decoding.slots import Read, Slots

GROWTH, PAGE = 1.25, 256
"""A store that is full becomes so much larger, in whole pages of slots."""


class Store:
    """Keys and values `[batch, kv_heads, slots, head_dim]`; memory is taken when the first ones come."""

    def __init__(self, slots: Slots) -> None:
        self.slots = slots
        self.capacity = 0
        self._reads: Sequence[Read] = ()
        self._k: Tensor | None = None
        self._v: Tensor | None = None

    @property
    def bytes_a_slot(self) -> int:
        """Of keys and values, all sequences and KV heads together."""
        return 0 if self._k is None else 2 * self._k[:, :, 0].numel() * self._k.element_size()

    @property
    def keys_read(self) -> int:
        """Slots that the last step read, of the sequence that read most, summed over groups of queries."""
        return sum(_slots_read(read) for read in self._reads)

    def read(self, reads: Sequence[Read], like: Tensor) -> list[tuple[Read, Part]]:
        """The keys and values of each read; `like`: keys of the step."""
        self._reads = reads
        if reads:
            self._grow(like)
        listed = [None if isinstance(read.slots, int) else read.slots[:, None] for read in reads]
        found = []
        for read, slots in zip(reads, listed, strict=True):
            k, v = self._k, self._v
            if isinstance(read.mask, BlockLayout):
                k, v = k[:, :, : read.slots], v[:, :, : read.slots]
            found.append((read, Part(k, v, read.mask, slots, read.count)))
        return found

    def write(self, k: Tensor, v: Tensor, where: Sequence[Tensor]) -> None:
        """k and v `[batch, kv_heads, units, head_dim]` into slots int64 `[batch, units]`, -1 for nowhere, each."""
        self._grow(k)
        batch = torch.arange(len(k), device=k.device)[:, None]
        for slot in where:
            slot = torch.where(slot < 0, self.capacity, slot)  # the slot behind the last takes what nobody will read
            self._k[batch, :, slot] = k.transpose(1, 2)
            self._v[batch, :, slot] = v.transpose(1, 2)

    def tensors(self) -> list[Tensor]:
        """All that it holds."""
        return [] if self._k is None else [self._k, self._v]

    def _grow(self, like: Tensor) -> None:
        if self._k is not None and self.slots.needed <= self.capacity:
            return
        listed = self.slots.needed - self.slots.ring
        growth = 1 if self.slots.reserved else GROWTH
        wanted = self.slots.ring + (-(-int(listed * growth) // PAGE) * PAGE if listed else 0)
        shape = (*like.shape[:2], wanted + 1, like.shape[3])
        for name in ("_k", "_v"):
            old, new = getattr(self, name), like.new_zeros(shape)
            if old is not None:
                new[:, :, : self.capacity] = old[:, :, : self.capacity]
            setattr(self, name, new)
        self.capacity = wanted


def _slots_read(read: Read) -> int:
    if isinstance(read.mask, BlockLayout):
        return int(read.mask.rows.count.sum(-1).max()) * read.mask.block
    if read.count is None:
        return read.mask.shape[3]
    # A step of fixed shapes has room for later keys, and its kernel skips what no query sees.
    entry = torch.arange(read.mask.shape[3], device=read.mask.device)
    return int((read.mask.any((1, 2)) & (entry < read.count[:, None])).sum(1).max())

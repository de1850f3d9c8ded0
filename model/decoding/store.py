"""One layer's keys and values in the slots that their pattern's bookkeeping gives them."""

from collections.abc import Sequence

import torch
from torch import Tensor

from model.decoding.direct import Part
from model.decoding.slots import Read, Slots

GROWTH, PAGE = 1.25, 256
"""A store that is full becomes so much larger, in whole pages of slots."""


class Store:
    """Keys and values `[batch, kv_heads, slots, head_dim]`, or keys alone; memory is taken when the first ones come."""

    def __init__(self, slots: Slots) -> None:
        self.slots = slots
        self.capacity = 0
        self.keys_read = 0
        """Slots that the last step read, summed over groups of queries."""
        self._k: Tensor | None = None
        self._v: Tensor | None = None

    @property
    def bytes_a_slot(self) -> int:
        """Of keys and values, all sequences and KV heads together."""
        return sum(x[:, :, 0].numel() * x.element_size() for x in (self._k, self._v) if x is not None)

    @property
    def bytes_a_number(self) -> int:
        """Of one element of keys that have values; 0: there are none."""
        return 0 if self._v is None else self._v.element_size()

    def read(self, reads: Sequence[Read]) -> list[tuple[Read, Part]]:
        """The keys and values of each read."""
        self.keys_read = sum(read.mask.shape[3] for read in reads)
        return [(read, Part(*self._pick(read.slots), read.mask)) for read in reads]

    def first(self, slots: int) -> tuple[Tensor, Tensor | None]:
        """Keys and values in the first slots: views."""
        return self._k[:, :, :slots], None if self._v is None else self._v[:, :, :slots]

    def read_blocks(self, blocks: Tensor, size: int) -> tuple[Tensor, Tensor]:
        """Keys and values of blocks of `size` slots, int64 `[batch, queries, selectors, picks]` with as many selectors
        for each KV head: `[batch, queries, selectors, picks * size, head_dim]`."""
        batch, heads, slots, head_dim = self._k.shape
        head = torch.arange(blocks.shape[2], device=blocks.device) // (blocks.shape[2] // heads)
        line = torch.arange(batch, device=blocks.device)[:, None, None, None] * heads + head[:, None]
        first = (line * slots + blocks * size).flatten()
        # All runs of `size` slots, of which any can be picked as one row: a view whose rows overlap.
        runs = (batch * heads * slots - size + 1, size, head_dim), (head_dim, head_dim, 1)
        k, v = (x.as_strided(*runs).index_select(0, first) for x in (self._k, self._v))
        return k.view(*blocks.shape[:3], -1, head_dim), v.view(*blocks.shape[:3], -1, head_dim)

    def write(self, k: Tensor, v: Tensor | None, where: Sequence[Tensor]) -> None:
        """k and v `[batch, kv_heads, units, head_dim]` into slots int64 `[batch, units]`, -1 for nowhere, each."""
        self._grow(k, v)
        batch = torch.arange(len(k), device=k.device)[:, None]
        for slot in where:
            slot = torch.where(slot < 0, self.capacity, slot)  # the slot behind the last takes what nobody will read
            self._k[batch, :, slot] = k.transpose(1, 2)
            if v is not None:
                self._v[batch, :, slot] = v.transpose(1, 2)

    def _pick(self, slots: Tensor | int) -> tuple[Tensor, Tensor]:
        if isinstance(slots, int):
            return self._k[:, :, :slots], self._v[:, :, :slots]
        index = slots[:, None, :, None].expand(-1, self._k.shape[1], -1, self._k.shape[3])
        return self._k.gather(2, index), self._v.gather(2, index)

    def _grow(self, k: Tensor, v: Tensor | None) -> None:
        if self._k is not None and self.slots.needed <= self.capacity:
            return
        listed = self.slots.needed - self.slots.ring
        wanted = self.slots.ring + (-(-int(listed * GROWTH) // PAGE) * PAGE if listed else 0)
        for name, like in (("_k", k), ("_v", v)):
            if like is None:
                continue
            old, new = getattr(self, name), like.new_zeros(*like.shape[:2], wanted + 1, like.shape[3])
            if old is not None:
                new[:, :, : self.capacity] = old[:, :, : self.capacity]
            setattr(self, name, new)
        self.capacity = wanted

"""One layer's keys and values in the slots that their pattern's CacheLayout assigns."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kernels import BlockLayout
from kernels.backends.direct import take_pages
from kernels.layout.cached_keys import CachedKeys
from model.kv_cache.cache_layout import CacheLayout, Read

GROWTH, PAGE = 1.25, 256
"""A full store grows by the factor GROWTH, rounded up to whole pages of PAGE slots."""


class Picks(NamedTuple):
    """The blocks of `size` slots that each query of a step reads. `blocks`: integers `[batch, selectors, queries,
    picks]`, -1 for none; every KV head has the same number of selectors."""

    blocks: Tensor
    size: int


class Store:
    """Stores keys and values `[batch, kv_heads, slots, head_dim]`, or keys alone. `write` allocates memory."""

    def __init__(self, layout: CacheLayout) -> None:
        self.layout = layout
        self.capacity = 0
        self._reads: list[Read | Picks | int] = []
        self._k: Tensor | None = None
        self._v: Tensor | None = None

    @property
    def bytes_a_slot(self) -> int:
        """Bytes of the keys and values in one slot, of all sequences and KV heads."""
        return sum(x[:, :, 0].numel() * x.element_size() for x in (self._k, self._v) if x is not None)

    @property
    def bytes_a_number(self) -> int:
        """Bytes of one element of keys and values; 0 if the store holds no values."""
        return 0 if self._v is None else self._v.element_size()

    @property
    def keys_read(self) -> int:
        """Number of slots that the last step read of the sequence that read most, summed over groups of queries."""
        return sum(_slots_read(read, self._k.shape[1]) for read in self._reads)

    def read(self, reads: Sequence[Read], like: Tensor) -> list[tuple[Read, CachedKeys]]:
        """Returns each read with its keys and values. `like`: keys of the step, for shape and dtype."""
        self._reads = list(reads)
        if reads:
            self._grow(like, like)
        listed = [None if isinstance(read.slots, int) else read.slots[:, None] for read in reads]
        found = []
        for read, slots in zip(reads, listed, strict=True):
            k, v = self._k, self._v
            if isinstance(read.mask, BlockLayout):
                k, v = k[:, :, : read.slots], v[:, :, : read.slots]
            found.append((read, CachedKeys(k, v, read.mask, slots, read.count)))
        return found

    def read_keys(self, slots: int) -> Tensor:
        """The keys in the first `slots` slots."""
        self._reads = [slots]
        return self._k[:, :, :slots]

    def read_picks(self, picks: Picks) -> tuple[Tensor, Tensor]:
        """All keys and values. The caller reads the given blocks of them, which are added to the reads of this step."""
        self._reads.append(picks)
        return self._k, self._v

    def gather(self, picks: Picks) -> tuple[Tensor, Tensor]:
        """Keys and values of the picks, `[batch, queries, selectors, picks * size, head_dim]`; arbitrary for -1."""
        blocks, size = picks.blocks.transpose(1, 2).clamp(min=0).long(), picks.size
        batch, _, selectors, _ = blocks.shape
        at = torch.arange(batch, device=blocks.device)[:, None, None, None]
        head = torch.arange(selectors, device=blocks.device)[:, None] // (selectors // self._k.shape[1])
        k, v = (take_pages(x, at, head, blocks, size).flatten(3, 4) for x in (self._k, self._v))
        return k, v

    def write(self, k: Tensor, v: Tensor | None, where: Sequence[Tensor]) -> None:
        """Writes k and v `[batch, kv_heads, units, head_dim]` to the slots that CacheLayout.write returned."""
        self._grow(k, v)
        batch = self.layout.sequence
        for slot in where:  # -1 is an extra slot after the last, which is never read
            self._k[batch, :, slot] = k.transpose(1, 2)
            if v is not None:
                self._v[batch, :, slot] = v.transpose(1, 2)

    def tensors(self) -> list[Tensor]:
        """All tensors of the store."""
        return [x for x in (self._k, self._v) if x is not None]

    def _grow(self, k: Tensor, v: Tensor | None) -> None:
        if self._k is not None and self.layout.needed <= self.capacity:
            return
        listed = self.layout.needed - self.layout.ring
        growth = 1 if self.layout.reserved else GROWTH
        wanted = self.layout.ring + (-(-int(listed * growth) // PAGE) * PAGE if listed else 0)
        for name, like in (("_k", k), ("_v", v)):
            if like is None:
                continue
            old, new = getattr(self, name), like.new_zeros(*like.shape[:2], wanted + 1, like.shape[3])
            if old is not None:
                new[:, :, : self.capacity] = old[:, :, : self.capacity]
            setattr(self, name, new)
        self.capacity = wanted


def _slots_read(read: Read | Picks | int, kv_heads: int) -> int:
    if isinstance(read, int):
        return read
    if isinstance(read, Picks):
        return int((read.blocks >= 0).sum((1, 2, 3)).max()) * read.size // kv_heads
    if isinstance(read.mask, BlockLayout):
        return int(read.mask.rows.count.sum(-1).max()) * read.mask.block
    if read.count is None:
        return read.mask.shape[3]
    # A step of fixed shapes has slots for later keys; its kernel skips those that no query sees.
    entry = torch.arange(read.mask.shape[3], device=read.mask.device)
    return int((read.mask.any((1, 2)) & (entry < read.count[:, None])).sum(1).max())

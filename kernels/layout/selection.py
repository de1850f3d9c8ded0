"""Selection: the list of key blocks of each query, and its transpose, the list of queries of each block."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Selection:
    """The key blocks that each query and selector chose, and the queries that chose each block.

    A selector is a KV head (`share: group`: its query heads attend to the same blocks) or a query head (`share: head`).
    Sizes follow from shapes alone, so the host never waits for a GPU.
    """

    block: int
    keys: int
    chosen: Tensor
    """int32 `[batch, selectors, queries, slots]`: key blocks in ascending order, then -1 for unused slots."""
    document_start: Tensor
    """int32 `[batch, queries]`: the first key that a query may see, its document's first token.

    Queries that choose the same block must have the same document start if it lies within the block or after it:
    kernels read it from one query of the block's list. `select` ensures this, since a query chooses blocks of its own
    document only. It is not checked at run time, because the check would wait for the GPU.
    """
    offsets: Tensor
    """int32 `[batch, selectors, key blocks + 1]`: block j's queries are `entries[offsets[j] : offsets[j + 1]]`."""
    entries: Tensor
    """int32 `[batch, selectors, queries * slots]`: query * slots + slot, sorted by block, then query; unused slots come
    last."""

    query: Tensor | None = None
    """int32 `[queries]`: the index of each query among the keys, if the queries are only some tokens of a longer
    sequence. None: 0, 1, ... It is used by diagnostics; `tensors` drops it."""

    @property
    def batch(self) -> int:
        return self.chosen.shape[0]

    @property
    def selectors(self) -> int:
        return self.chosen.shape[1]

    @property
    def queries(self) -> int:
        return self.chosen.shape[2]

    @property
    def slots(self) -> int:
        return self.chosen.shape[3]

    @property
    def device(self) -> torch.device:
        return self.chosen.device

    @property
    def query_index(self) -> Tensor:
        """int32 `[queries]`: the index of each query among the keys."""
        index = torch.arange(self.queries, dtype=torch.int32, device=self.device)
        return index if self.query is None else self.query

    def tensors(self) -> list[Tensor]:
        """The selection as a flat list of tensors, the form that `torch.library` operators accept."""
        return [self.chosen, self.document_start, self.offsets, self.entries]

    @staticmethod
    def from_tensors(tensors: Sequence[Tensor], keys: int, block: int) -> "Selection":
        """The inverse of `tensors`."""
        return Selection(block, keys, *tensors)

    @staticmethod
    def from_chosen(chosen: Tensor, keys: int, block: int, document_start: Tensor | None = None) -> "Selection":
        """A selection from `chosen`, with its transpose. `document_start=None`: each sequence is one document."""
        if document_start is None:
            document_start = torch.zeros(chosen.shape[0], chosen.shape[2], dtype=torch.int32, device=chosen.device)
        return Selection(block, keys, chosen, document_start.contiguous(), *transpose(chosen, -(-keys // block)))

    def pairs(self) -> Tensor:
        """int64 `[batch, selectors]`: visible (query, key) pairs."""
        start = torch.maximum(self.chosen * self.block, self.document_start[:, None, :, None])
        return torch.where(self.chosen >= 0, (self.chosen + 1) * self.block - start, 0).sum((2, 3))

    def dense_mask(self) -> Tensor:
        """Booleans `[batch, selectors, queries, keys]`: for reference results and pictures of small sizes."""
        blocks = -(-self.keys // self.block)
        seen = torch.zeros(*self.chosen.shape[:3], blocks + 1, dtype=torch.bool, device=self.device)
        seen.scatter_(3, torch.where(self.chosen < 0, blocks, self.chosen).long(), True)
        mask = seen[..., :blocks].repeat_interleave(self.block, 3)[..., : self.keys]
        return mask & (torch.arange(self.keys, device=self.device) >= self.document_start[:, None, :, None])


def transpose(chosen: Tensor, blocks: int) -> tuple[Tensor, Tensor]:
    """(offsets, entries) of a Selection, from `chosen`: a stable sort by block, which never waits for the device.
    ValueError: a sequence has more choices than int32 counts."""
    batch, selectors, length, slots = chosen.shape
    if length * slots >= 1 << 31:  # entries are int32
        raise ValueError(f"a selection of {length:,} queries and {slots} slots: must be fewer than {1 << 31:,} choices")
    flat = torch.where(chosen < 0, blocks, chosen).view(batch * selectors, length * slots)
    row = torch.arange(batch * selectors, dtype=torch.int32, device=chosen.device)[:, None]
    block_index = torch.arange(blocks + 1, dtype=torch.int32, device=chosen.device)
    if batch * selectors * (blocks + 1) < 1 << 31:  # one sort for all rows, if their keys fit int32
        keys, order = (row * (blocks + 1) + flat).flatten().sort(stable=True)
        entries = (order.view_as(flat) - row.long() * flat.shape[1]).int()
        keys = keys.view_as(flat)
        offsets = torch.searchsorted(keys, row * (blocks + 1) + block_index, out_int32=True)
    else:
        keys, order = torch.sort(flat, dim=-1, stable=True)
        entries = order.int()
        offsets = torch.searchsorted(keys, block_index.expand(len(keys), -1).contiguous(), out_int32=True)
    return offsets.view(batch, selectors, blocks + 1), entries.view(batch, selectors, length * slots)

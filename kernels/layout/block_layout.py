"""BlockLayout: the sparse matrix of tiles that every backend walks. builder.py makes it from a pattern.

For each block of queries (a row) it lists the blocks of keys with a visible pair, for the forward pass and dQ; for
each block of keys (a column) the blocks of queries, for dK and dV. A fully visible tile has no mask; a partial tile has
an entry in a table of masks, which equal tiles share.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kernels.layout.axis import Axis
from kernels.layout.cost import TRAINING_FLOPS, AttentionCost, causal_pairs
from kernels.patterns.base import Pattern

FULL = -1
"""Tile id of a fully visible tile."""


@dataclass(frozen=True, eq=False)
class TileList:
    """Tiles listed by one side of the matrix: by rows (query blocks) or by columns (key blocks).

    The tiles of one row are `blocks[start : start + count]`, with the row's own `start` and `count`: first the
    `partial` tiles with a mask, then the fully visible ones, each in ascending order. ValueError: there are more tiles
    than int32 can count.
    """

    start: Tensor  # int32 [batch, heads, rows]
    count: Tensor  # int32 [batch, heads, rows]
    partial: Tensor  # int32 [batch, heads, rows]
    blocks: Tensor  # int32 [entries]: the other side's block index
    tiles: Tensor  # int32 [entries]: FULL, or an index into the mask table

    def __post_init__(self) -> None:
        if len(self.blocks) >= 1 << 31:
            raise ValueError(f"a layout of {len(self.blocks):,} tiles: must have fewer than {1 << 31:,}")

    def tensors(self) -> tuple[Tensor, ...]:
        """Returns the fields in order. (torch.compile of PyTorch 2.11 cannot trace `vars`.)"""
        return self.start, self.count, self.partial, self.blocks, self.tiles


@dataclass(frozen=True, eq=False)
class Source:
    """What a layout was built from: one pattern for all KV heads or one for each, and the two axes."""

    patterns: tuple[Pattern, ...]
    queries: Axis
    keys: Axis

    @property
    def window(self) -> int | None:
        """The width of the window, if all heads have the same plain window over sequences of one document, and the last
        query is at the last key (Dense: the width is the number of keys); else None."""
        if not self.queries.is_plain or len(set(self.patterns)) > 1:
            return None
        _, queries, offset = self.queries.key
        if self.keys.key != ("tokens", queries + offset, 0):
            return None
        return self.patterns[0].plain_window(self.keys.length)


@dataclass(frozen=True, eq=False)
class BlockLayout:
    """The visible tiles of `block` x `block` pairs, and the visible pairs within partial tiles.

    `batch` and `heads` (KV heads) are 1 if all sequences or heads share one layout. Rows or columns beyond a ragged end
    are invisible.
    """

    queries: int
    keys: int
    block: int
    rows: TileList
    columns: TileList
    masks: Tensor
    """int32 `[tiles, block, ceil(block / 32)]`, tiles >= 1; bit j of word w of row i: query i sees key 32 w + j."""
    pairs: Tensor
    """int64 `[batch, heads]`: visible (query, key) pairs."""
    overflow: Tensor | None = None
    """bool `[]` for layouts of fixed sizes: True if these were too small and the layout is wrong. None: sizes are
    exact."""
    window: int | None = None
    """The width, if the whole layout is a plain sliding window up to the last key (see `Source.window`)."""
    source: Source | None = None
    """For backends that compile the pattern itself; `tensors` drops it."""

    @property
    def batch(self) -> int:
        return self.pairs.shape[0]

    @property
    def heads(self) -> int:
        return self.pairs.shape[1]

    @property
    def device(self) -> torch.device:
        return self.masks.device

    def tensors(self) -> list[Tensor]:
        """The layout as a flat list of tensors, the form that `torch.library` operators accept."""
        return [*self.rows.tensors(), *self.columns.tensors(), self.masks, self.pairs]

    @staticmethod
    def from_tensors(
        tensors: Sequence[Tensor], queries: int, keys: int, block: int, window: int | None = None
    ) -> "BlockLayout":
        """The inverse of `tensors`."""
        rows, columns = TileList(*tensors[:5]), TileList(*tensors[5:10])
        return BlockLayout(queries, keys, block, rows, columns, *tensors[10:], window=window)

    @property
    def bytes(self) -> int:
        """Bytes of the layout's tensors: the metadata that a kernel reads in addition to q, k and v."""
        return sum(t.numel() * t.element_size() for t in self.tensors())

    def cost(self, batch: int, heads: int, head_dim: int) -> AttentionCost:
        """The cost of `attention()` with `batch` sequences and `heads` query heads under this layout."""
        repeat = (batch // self.batch) * (heads // self.heads)
        visible = int(self.pairs.sum()) * repeat
        tiles = int(self.rows.count.sum()) * self.block**2 * repeat
        flops = TRAINING_FLOPS * head_dim * visible
        return AttentionCost(visible, tiles, causal_pairs(self.queries, self.keys) * batch * heads, flops)

    def parts(self) -> dict[str, int]:
        """Visible pairs by kind of key; empty here, because all keys are tokens."""
        return {}

    def token_masks(self) -> list[tuple[Tensor, float]]:
        """Masks for a picture of the first sequence: (booleans `[queries, keys]`, shade from 0 to 1). A pair is True if
        any KV head sees it."""
        return [(self.dense_mask()[0].any(0), 1.0)]

    def tile_masks(self) -> Tensor:
        """The mask table as booleans `[tiles, block, block]`."""
        shifts = torch.arange(32, dtype=torch.int32, device=self.device)
        bits = (self.masks[..., None] >> shifts) & 1
        return bits.bool().flatten(-2)[..., : self.block]

    def dense_mask(self) -> Tensor:
        """The whole mask as booleans `[batch, heads, queries, keys]`: for oracles, pictures and small sizes."""
        table = torch.cat([self.tile_masks(), torch.ones_like(self.tile_masks()[:1])])  # index FULL = -1: the last one
        row_blocks, key_blocks = -(-self.queries // self.block), -(-self.keys // self.block)
        grid = torch.zeros(
            self.batch, self.heads, row_blocks, key_blocks, self.block, self.block, dtype=torch.bool, device=self.device
        )
        for b, h, r in np.ndindex(self.batch, self.heads, row_blocks):
            first = int(self.rows.start[b, h, r])
            entries = slice(first, first + int(self.rows.count[b, h, r]))
            grid[b, h, r, self.rows.blocks[entries].long()] = table[self.rows.tiles[entries].long()]
        mask = grid.transpose(3, 4).reshape(self.batch, self.heads, row_blocks * self.block, key_blocks * self.block)
        return mask[..., : self.queries, : self.keys]


def any_overflow(layouts: Sequence[object]) -> Tensor | None:
    """bool `[]`: whether any of `layouts` (objects with `overflow`) overflowed; None if none has fixed sizes."""
    flags = [each.overflow for each in layouts if each.overflow is not None]
    return torch.stack(flags).any() if flags else None

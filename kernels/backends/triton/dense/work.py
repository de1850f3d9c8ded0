"""What the kernels need beside the layout itself, prepared once per layout and kept as long as the layout lives.

- In which order rows and columns are worked on: longest first, so that no long one is left over at the end.
- The masks transposed, because dK and dV look at a tile from the keys' side.
- Columns cut into chunks. The column of a global block is seen by every query: one program would still be walking it
  long after all others had finished. A chunk writes partial dK and dV, which are added up in a fixed order.

Everything here runs on the device without asking it for a value; sizes are bounds that follow from shapes alone.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from kernels.layout.block_layout import BlockLayout

SHORTEST_CHUNK = 16
"""Columns are not cut finer than this many tiles: partial sums cost about as much as a few tiles."""

CHUNKS_PER_PROCESSOR = 3
"""A chunk is at most the mean work of a multiprocessor divided by this."""

ITEM = tl.constexpr(8)
"""int32 values an item of work: batch, KV head, row or column, first entry, entries, partial entries, slot, 0."""


@dataclass(frozen=True, eq=False)
class Work:
    """One side's work for a number of sequences and KV heads."""

    items: Tensor
    """int32 `[items, ITEM]`, in the order to be started. Slot -1: a whole row or column; slot -2: nothing to do."""
    slots: int
    """Partial sums to make room for; 0: nothing can be long enough to be cut."""
    chunks: Tensor | None
    """int32 `[batch * KV heads * columns, 2]`: each column's first slot and number of chunks; None without slots."""


class Plan:
    """All that was prepared for one layout."""

    def __init__(self, layout: BlockLayout) -> None:
        # The tensors alone, not the layout: a plan must not keep its own key in the dictionary alive.
        self._sides = {
            "rows": (layout.rows.start.clone(), layout.rows.count.clone(), layout.rows.partial.clone()),
            "columns": (layout.columns.start, layout.columns.count, layout.columns.partial),
        }
        self._entries = layout.columns.blocks.numel() * layout.heads
        self._masks = layout.masks
        self._transposed: Tensor | None = None
        self._work: dict[tuple, Work] = {}

    @property
    def transposed_masks(self) -> Tensor:
        """int32 like `BlockLayout.masks`, keys and queries exchanged."""
        if self._transposed is None:
            self._transposed = torch.empty_like(self._masks)
            tiles, block, words = self._masks.shape
            _transpose[(tiles,)](self._masks, self._transposed, block, words, max(block, 32))
        return self._transposed

    def rows(self, batch: int, kv_heads: int) -> Work:
        """The rows' work for `batch` sequences of `kv_heads`; rows are never cut."""
        return self._get("rows", batch, kv_heads, None)

    def columns(self, batch: int, kv_heads: int) -> Work:
        """The columns' work, long columns cut in chunks."""
        layout_batch, layout_heads, _ = self._sides["columns"][0].shape
        tiles = self._entries * (batch // layout_batch) * (kv_heads // layout_heads)
        chunk = longest_chunk(tiles, self._masks.device)
        return self._get("columns", batch, kv_heads, chunk if chunk < self._sides["rows"][0].shape[2] else None)

    def _get(self, side: str, batch: int, kv_heads: int, chunk: int | None) -> Work:
        key = side, batch, kv_heads, chunk
        if key not in self._work:
            self._work[key] = _list_work(*self._sides[side], batch, kv_heads, self._entries, chunk)
        return self._work[key]


_plans = WeakIdKeyDictionary()  # by the identity of a tensor of the layout: operators receive tensors, not the layout


def plan_of(layout: BlockLayout) -> Plan:
    """The layout's plan, made at the first call."""
    plan = _plans.get(layout.rows.count)
    if plan is None:
        plan = _plans[layout.rows.count] = Plan(layout)
    return plan


def longest_chunk(tiles: int, device: torch.device) -> int:
    """How many tiles of a column one program may walk, where there are `tiles` in all."""
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132
    return max(SHORTEST_CHUNK, -(-tiles // (processors * CHUNKS_PER_PROCESSOR)))


def _list_work(
    start: Tensor, count: Tensor, partial: Tensor, batch: int, kv_heads: int, entries: int, chunk: int | None
) -> Work:
    """The work on lines (rows or columns) given by int32 `[layout batch, layout heads, lines]`.

    entries: no fewer than the tiles of all lines. chunk: no item walks more tiles; None: nothing is cut.
    """
    lines = start.shape[2]
    repeat = (batch // start.shape[0]) * (kv_heads // start.shape[1])
    start, count, partial = (t.expand(batch, kv_heads, lines).flatten().long() for t in (start, count, partial))
    line = torch.arange(len(count), device=count.device)
    if chunk is None:
        slots, chunks, slot = 0, None, torch.full_like(line, -1)
    else:
        pieces = ((count + chunk - 1) // chunk).clamp(min=1)
        cut = torch.where(pieces > 1, pieces, 0)
        first_slot = cut.cumsum(0) - cut
        chunks = torch.stack([first_slot, pieces], -1).int().contiguous()
        # Bounds that need no look at the counts: ceil(n / chunk) <= n / chunk + 1, and <= 2 n / chunk where n > chunk.
        slots = 2 * (entries * repeat // chunk)
        item = torch.arange(len(count) + entries * repeat // chunk, device=count.device)
        ends = pieces.cumsum(0)
        line = torch.searchsorted(ends, item, right=True).clamp(max=len(count) - 1)
        index = item - (ends - pieces)[line]
        live = item < ends[-1]
        skipped = index * chunk
        start = start[line] + skipped
        count = torch.where(live, (count[line] - skipped).clamp(min=0, max=chunk), 0)
        partial = torch.minimum((partial[line] - skipped).clamp(min=0), count)
        slot = torch.where(pieces[line] > 1, first_slot[line] + index, -1)
        slot = torch.where(live, slot, -2)
    # Longest first, in classes of length by powers of two. Within a class one KV head after the other, whose keys and
    # values (or queries) then stay in the L2 cache, and there again the longest first.
    head = line // lines
    length = (count + 1).float().log2().floor().long()
    order = torch.argsort(
        (((31 - length) * batch * kv_heads) + head) * (1 << 24) + ((1 << 24) - 1 - count), stable=True
    )
    fields = [head // kv_heads, head % kv_heads, line % lines, start, count, partial, slot, torch.zeros_like(slot)]
    return Work(torch.stack(fields, -1)[order].int().contiguous(), slots, chunks)


@triton.jit
def _transpose(masks, transposed, BLOCK: tl.constexpr, WORDS: tl.constexpr, PADDED: tl.constexpr):
    """One tile's bits, lines and columns exchanged."""
    tile = tl.program_id(0).to(tl.int64) * BLOCK * WORDS
    line = tl.arange(0, PADDED)
    for w in tl.static_range(WORDS):
        word = tl.load(masks + tile + line * WORDS + w, mask=line < BLOCK, other=0)  # bit j of line i: column 32 w + j
        column = tl.arange(0, 32)
        bits = (word[:, None] >> column[None, :]) & 1
        shifted = bits << (line & 31)[:, None]
        packed = tl.sum(tl.reshape(shifted, [WORDS, 32, 32]), 1)  # [words of a line, column]
        target = (32 * w + column)[None, :] * WORDS + tl.arange(0, WORDS)[:, None]
        tl.store(transposed + tile + target, packed, mask=((32 * w + column) < BLOCK)[None, :])

"""Data that the dense kernels need in addition to the layout, prepared once per layout and kept as long as it.

- The order of rows and columns: longest first, so that no long one is left for the end.
- Transposed masks, because dK and dV read tiles by keys.
- Chunks of long columns. Every query sees the column of a global block: a single program would still walk it long after
all others have finished. Each chunk writes partial dK and dV, which are summed in a fixed order.

Everything runs on the device, and the host never waits for it: sizes are upper bounds that follow from shapes.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from kernels.layout.block_layout import BlockLayout

MIN_CHUNK = 16
"""Minimum size of a chunk, in tiles: a partial sum costs about as much as a few tiles."""

CHUNKS_PER_PROCESSOR = 3
"""The maximum size of a chunk is the mean work of a multiprocessor, divided by this number."""

ITEM_FIELDS = tl.constexpr(8)
"""int32 values per item of work: batch, KV head, row or column, first entry, entries, partial entries, buffer, 0."""


@dataclass(frozen=True, eq=False)
class Work:
    """The work on all rows or all columns, for a number of sequences and KV heads."""

    items: Tensor
    """int32 `[items, ITEM_FIELDS]`, in launch order. Buffer -1: a whole row or column; buffer -2: no work."""
    buffers: int
    """Number of partial sums to allocate; 0: no column is long enough to be split."""
    chunks: Tensor | None
    """int32 `[batch * KV heads * columns, 2]`: each column's first buffer and number of chunks; None if there are no
    buffers."""


class Plan:
    """The prepared data of one layout."""

    def __init__(self, layout: BlockLayout) -> None:
        # Copies, because a plan must not keep alive the tensor that is its key in `_plans`.
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
        """int32 like `BlockLayout.masks`, with keys and queries exchanged."""
        if self._transposed is None:
            self._transposed = torch.empty_like(self._masks)
            tiles, block, words = self._masks.shape
            _transpose[(tiles,)](self._masks, self._transposed, block, words, max(block, 32))
        return self._transposed

    def rows(self, batch: int, kv_heads: int) -> Work:
        """The work on rows for `batch` sequences of `kv_heads`; rows are never split."""
        return self._get("rows", batch, kv_heads, None)

    def columns(self, batch: int, kv_heads: int) -> Work:
        """The work on columns; long columns are split into chunks."""
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
    """The layout's plan, built by the first call."""
    plan = _plans.get(layout.rows.count)
    if plan is None:
        plan = _plans[layout.rows.count] = Plan(layout)
    return plan


def longest_chunk(tiles: int, device: torch.device) -> int:
    """Maximum size of a chunk, if all columns together have `tiles` tiles."""
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132
    return max(MIN_CHUNK, -(-tiles // (processors * CHUNKS_PER_PROCESSOR)))


def _list_work(
    start: Tensor, count: Tensor, partial: Tensor, batch: int, kv_heads: int, entries: int, chunk: int | None
) -> Work:
    """The work on rows or columns, given their lists of tiles: start, count, partial int32 `[layout batch, layout
    heads, lists]`.

    entries: an upper bound of the tiles of all lists. chunk: the maximum number of tiles per item; None: no list is
    split.
    """
    lists = start.shape[2]
    repeat = (batch // start.shape[0]) * (kv_heads // start.shape[1])
    start, count, partial = (t.expand(batch, kv_heads, lists).flatten().long() for t in (start, count, partial))
    list_index = torch.arange(len(count), device=count.device)
    if chunk is None:
        buffers, chunks, buffer = 0, None, torch.full_like(list_index, -1)
    else:
        chunk_counts = ((count + chunk - 1) // chunk).clamp(min=1)
        split_counts = torch.where(chunk_counts > 1, chunk_counts, 0)
        first_buffer = split_counts.cumsum(0) - split_counts
        chunks = torch.stack([first_buffer, chunk_counts], -1).int().contiguous()
        # Upper bounds without the counts: ceil(n / chunk) <= n / chunk + 1, and <= 2 n / chunk if n > chunk.
        buffers = 2 * (entries * repeat // chunk)
        item = torch.arange(len(count) + entries * repeat // chunk, device=count.device)
        ends = chunk_counts.cumsum(0)
        list_index = torch.searchsorted(ends, item, right=True).clamp(max=len(count) - 1)
        index = item - (ends - chunk_counts)[list_index]
        live = item < ends[-1]
        skipped = index * chunk
        start = start[list_index] + skipped
        count = torch.where(live, (count[list_index] - skipped).clamp(min=0, max=chunk), 0)
        partial = torch.minimum((partial[list_index] - skipped).clamp(min=0), count)
        buffer = torch.where(chunk_counts[list_index] > 1, first_buffer[list_index] + index, -1)
        buffer = torch.where(live, buffer, -2)
    # Longest first, in classes of length by powers of two. Within a class, items are sorted by KV head, whose keys and
    # values (or queries) then stay in the L2 cache, and then by length.
    head = list_index // lists
    length = (count + 1).float().log2().floor().long()
    order = torch.argsort(
        (((31 - length) * batch * kv_heads) + head) * (1 << 24) + ((1 << 24) - 1 - count), stable=True
    )
    fields = [
        head // kv_heads,
        head % kv_heads,
        list_index % lists,
        start,
        count,
        partial,
        buffer,
        torch.zeros_like(buffer),
    ]
    return Work(torch.stack(fields, -1)[order].int().contiguous(), buffers, chunks)


@triton.jit
def _transpose(masks, transposed, BLOCK: tl.constexpr, WORDS: tl.constexpr, PADDED: tl.constexpr):
    """Transposes the bits of one tile."""
    tile = tl.program_id(0).to(tl.int64) * BLOCK * WORDS
    row = tl.arange(0, PADDED)
    for w in tl.static_range(WORDS):
        word = tl.load(masks + tile + row * WORDS + w, mask=row < BLOCK, other=0)  # bit j of row i: column 32 w + j
        column = tl.arange(0, 32)
        bits = (word[:, None] >> column[None, :]) & 1
        shifted = bits << (row & 31)[:, None]
        packed = tl.sum(tl.reshape(shifted, [WORDS, 32, 32]), 1)  # [words per row, column]
        target = (32 * w + column)[None, :] * WORDS + tl.arange(0, WORDS)[:, None]
        tl.store(transposed + tile + target, packed, mask=((32 * w + column) < BLOCK)[None, :])

"""Divides the work on a Selection: into chunks of queries, whose partial results fit in memory, and items for programs.

The lists of a Selection are ordered by (sequence, selector, key block). Everything runs on the device, and the host
never waits for it: sizes are upper bounds that follow from shapes.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels.layout.selection import Selection

PARTIAL_OUTPUTS, MIN_PARTIAL_BYTES = 1, 2 << 30
"""Memory for the partial results of one chunk of queries (one output per query head and slot): this many times the
memory of the whole output, and at least 2 GB."""

ROWS_PER_ITEM = 2048
"""Maximum number of rows (a query and a head each) per item; the item's program loads K and V of its block once."""

ITEM_FIELDS = tl.constexpr(5)
"""int32 values per item: index of its list, first entry, entries (0: no work), buffer (-1: the list is not split),
first row of its partial results."""


@dataclass(frozen=True, eq=False)
class SelectionPlan:
    """The lists of a Selection, divided into chunks of queries and into items."""

    queries_per_chunk: int
    chunks: int
    items: Tensor
    """int32 `[chunks, items, ITEM_FIELDS]`."""
    split_lists: Tensor
    """int32 `[chunks, lists, 2]`: each list's first buffer and number of items, which is 0 if the list is not split."""
    buffers: int
    """Number of partial sums to allocate; 0: no list is long enough to be split."""
    rows: int
    """Number of rows of partial results to allocate."""


def max_queries_per_chunk(selection: Selection, bytes_per_slot: int) -> int:
    """The number of queries whose partial results, `bytes_per_slot` per slot and selector, fit in the memory for a
    chunk."""
    slot_bytes = selection.batch * selection.selectors * bytes_per_slot
    budget = max(MIN_PARTIAL_BYTES, PARTIAL_OUTPUTS * slot_bytes * selection.queries)
    return min(selection.queries, max(1, budget // (slot_bytes * selection.slots)))


def describe_partials(partial: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """A descriptor of partial results `[rows, head_dim]` with blocks `[rows, columns]`, for the copy engine (TMA)."""
    return TensorDescriptor(partial, list(partial.shape), [partial.shape[1], 1], [rows, columns])


def make_plan(
    selection: Selection,
    group: int,
    bytes_per_slot: int,
    queries_per_chunk: int | None = None,
    step: int = 1,
    rows_per_item: int | None = None,
) -> SelectionPlan:
    """The plan for `group` query heads per selector, whose partial results take `bytes_per_slot` per slot.

    queries_per_chunk and rows_per_item are for benchmarks. step: each item has space for a multiple of this number of
    rows.
    """
    batch_selectors, blocks = selection.batch * selection.selectors, selection.offsets.shape[2] - 1
    lists = batch_selectors * blocks
    queries_per_chunk = min(queries_per_chunk or max_queries_per_chunk(selection, bytes_per_slot), selection.queries)
    chunks = triton.cdiv(selection.queries, queries_per_chunk)
    longest = max(1, (rows_per_item or ROWS_PER_ITEM) // group)
    bounds = torch.empty(lists, chunks + 1, dtype=torch.int32, device=selection.device)
    _find_bounds[(lists,)](
        selection.offsets,
        selection.entries,
        bounds,
        blocks,
        selection.queries * selection.slots,
        queries_per_chunk * selection.slots,
        CHUNKS=chunks,
        WIDTH=triton.next_power_of_2(chunks + 1),
        num_warps=1,
    )
    first = bounds[:, :-1].T.contiguous().long()  # [chunks, lists]
    count = bounds.diff().T.contiguous().long()
    items_per_list = (count + longest - 1) // longest
    ends = items_per_list.cumsum(1)
    entries = batch_selectors * queries_per_chunk * selection.slots  # of one chunk of queries, at most
    item = torch.arange(entries // longest + lists, device=selection.device).expand(chunks, -1).contiguous()
    list_index = torch.searchsorted(ends, item, right=True).clamp(max=lists - 1)
    index = item - (ends - items_per_list).gather(1, list_index)
    skipped = index * longest
    remaining = (count.gather(1, list_index) - skipped).clamp(min=0, max=longest)
    split_items = torch.where(items_per_list > 1, items_per_list, 0)
    first_buffer = split_items.cumsum(1) - split_items
    buffer = torch.where(split_items.gather(1, list_index) > 0, first_buffer.gather(1, list_index) + index, -1)
    remaining = torch.where(item < ends[:, -1:], remaining, 0)
    padded_rows = (remaining * group + step - 1) // step * step
    fields = [list_index, first.gather(1, list_index) + skipped, remaining, buffer, padded_rows.cumsum(1) - padded_rows]
    # Lists of more than `longest` entries have fewer than 2 * entries / longest items in total.
    return SelectionPlan(
        queries_per_chunk=queries_per_chunk,
        chunks=chunks,
        items=torch.stack(fields, -1).int().contiguous(),
        split_lists=torch.stack([first_buffer, split_items], -1).int().contiguous(),
        buffers=2 * (entries // longest) if queries_per_chunk > longest else 0,
        rows=entries * group + item.shape[1] * (step - 1),
    )


@triton.jit
def entry_and_head(start, M: tl.constexpr, GROUP: tl.constexpr):
    """The entry within the item, and the head within its GROUP, of M rows from `start`, a multiple of M."""
    row = tl.arange(0, M)
    if M % GROUP == 0:  # the second terms are the same in every step
        return start // GROUP + row // GROUP, row % GROUP
    else:
        return (start + row) // GROUP, (start + row) % GROUP


@triton.jit(do_not_specialize=["blocks", "entries_per_batch_selector", "entries_per_chunk"])
def _find_bounds(
    offsets,
    entries,
    bounds,
    blocks,
    entries_per_batch_selector,
    entries_per_chunk,
    CHUNKS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Where each chunk of queries begins in a list (and the last one ends), by binary search."""
    batch_selector = (tl.program_id(0) // blocks).to(tl.int64)
    at = offsets + tl.program_id(0) + batch_selector  # offsets has one more value per (sequence, selector)
    place = tl.arange(0, WIDTH)
    wanted = place.to(tl.int64) * entries_per_chunk
    low = tl.zeros([WIDTH], tl.int32) + tl.load(at)
    high = tl.zeros([WIDTH], tl.int32) + tl.load(at + 1)
    while tl.max(high - low, 0) > 0:
        middle = (low + high) // 2
        searching = low < high
        entry = tl.load(entries + batch_selector * entries_per_batch_selector + middle, mask=searching, other=0)
        lower = searching & (entry < wanted)
        low = tl.where(lower, middle + 1, low)
        high = tl.where(searching & (entry >= wanted), middle, high)
    tl.store(bounds + tl.program_id(0).to(tl.int64) * (CHUNKS + 1) + place, low, mask=place <= CHUNKS)

"""How the work on a Selection is cut: pieces of queries, whose partial results fit a budget, and items for programs.

A line is a (sequence, selector), sequence-major. Everything runs on the device without asking it for a value; sizes
are bounds that follow from shapes alone.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels.layout.selection import Selection

PARTIAL_OUTPUTS, LEAST_PARTIAL_BYTES = 1, 2 << 30
"""Memory for the partial results of one piece of queries (one output a query head and slot): at most so many times the
memory of the whole output, or 2 GB."""

ROWS_AN_ITEM = 2048
"""Rows (a query and a head each) that a program serves at most: it loads K and V of its block once for them."""

SELECTED_ITEM = tl.constexpr(5)
"""int32 values an item: line * key blocks + key block, first entry, entries (0: nothing to do), slot (-1: not cut),
first row of its partial results."""


@dataclass(frozen=True, eq=False)
class SelectedPlan:
    """A Selection's lists by key block, cut by pieces of queries and in items."""

    piece: int
    """Queries a piece."""
    pieces: int
    items: Tensor
    """int32 `[pieces, items, SELECTED_ITEM]`."""
    cuts: Tensor
    """int32 `[pieces, lines * key blocks, 2]`: first slot and number of items of a block's list."""
    slots: int
    """Partial sums to make room for in one piece; 0: no list can be long enough to be cut."""
    rows: int
    """Rows of partial results to make room for in one piece."""


def queries_at_once(selection: Selection, bytes_a_slot: int) -> int:
    """Queries whose partial results, `bytes_a_slot` for each of a query's slots, fit that memory."""
    an_output = selection.batch * selection.selectors * bytes_a_slot
    budget = max(LEAST_PARTIAL_BYTES, PARTIAL_OUTPUTS * an_output * selection.queries)
    return min(selection.queries, max(1, budget // (an_output * selection.slots)))


def rows_of_partials(partial: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """Describes partial results `[rows, head_dim]` by boxes of so many rows and columns, for the copy engine."""
    return TensorDescriptor(partial, list(partial.shape), [partial.shape[1], 1], [rows, columns])


def make_plan(
    selection: Selection,
    group: int,
    bytes_a_slot: int,
    piece: int | None = None,
    step: int = 1,
    rows_an_item: int | None = None,
) -> SelectedPlan:
    """The plan for `group` query heads a selector whose partial result of a slot takes `bytes_a_slot`.

    piece: queries at once, for benchmarks. step: each item has room for a multiple of so many rows. rows_an_item: at
    most, by default ROWS_AN_ITEM.
    """
    lines, blocks = selection.batch * selection.selectors, selection.offsets.shape[2] - 1
    piece = min(piece or queries_at_once(selection, bytes_a_slot), selection.queries)
    pieces = triton.cdiv(selection.queries, piece)
    longest = max(1, (rows_an_item or ROWS_AN_ITEM) // group)
    bounds = torch.empty(lines * blocks, pieces + 1, dtype=torch.int32, device=selection.device)
    _find_bounds[(lines * blocks,)](
        selection.offsets,
        selection.entries,
        bounds,
        blocks,
        selection.queries * selection.slots,
        piece * selection.slots,
        PIECES=pieces,
        WIDTH=triton.next_power_of_2(pieces + 1),
        num_warps=1,
    )
    first = bounds[:, :-1].T.contiguous().long()  # [pieces, lines * blocks]
    count = bounds.diff().T.contiguous().long()
    parts = (count + longest - 1) // longest
    ends = parts.cumsum(1)
    entries = lines * piece * selection.slots  # of one piece of queries, at most
    item = torch.arange(entries // longest + lines * blocks, device=selection.device).expand(pieces, -1).contiguous()
    list_of = torch.searchsorted(ends, item, right=True).clamp(max=lines * blocks - 1)
    index = item - (ends - parts).gather(1, list_of)
    taken = index * longest
    left = (count.gather(1, list_of) - taken).clamp(min=0, max=longest)
    cut = torch.where(parts > 1, parts, 0)
    first_slot = cut.cumsum(1) - cut
    slot = torch.where(cut.gather(1, list_of) > 0, first_slot.gather(1, list_of) + index, -1)
    left = torch.where(item < ends[:, -1:], left, 0)
    room = (left * group + step - 1) // step * step
    fields = [list_of, first.gather(1, list_of) + taken, left, slot, room.cumsum(1) - room]
    # Lists of more than `longest` entries have fewer than 2 * entries / longest parts.
    return SelectedPlan(
        piece=piece,
        pieces=pieces,
        items=torch.stack(fields, -1).int().contiguous(),
        cuts=torch.stack([first_slot, cut], -1).int().contiguous(),
        slots=2 * (entries // longest) if piece > longest else 0,
        rows=entries * group + item.shape[1] * (step - 1),
    )


@triton.jit
def entry_and_head(start, M: tl.constexpr, GROUP: tl.constexpr):
    """Of M rows from `start` (a multiple of M) on: which entry of the item, and which of its GROUP heads."""
    row = tl.arange(0, M)
    if M % GROUP == 0:  # then most of it is the same in every step
        return start // GROUP + row // GROUP, row % GROUP
    else:
        return (start + row) // GROUP, (start + row) % GROUP


@triton.jit(do_not_specialize=["blocks", "entries_a_line", "entries_a_piece"])
def _find_bounds(
    offsets,
    entries,
    bounds,
    blocks,
    entries_a_line,
    entries_a_piece,
    PIECES: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Where in a block's list each piece of queries begins (and the last one ends): a binary search for each."""
    line = (tl.program_id(0) // blocks).to(tl.int64)
    at = offsets + tl.program_id(0) + line  # offsets has one more value a line
    place = tl.arange(0, WIDTH)
    wanted = place.to(tl.int64) * entries_a_piece
    low = tl.zeros([WIDTH], tl.int32) + tl.load(at)
    high = tl.zeros([WIDTH], tl.int32) + tl.load(at + 1)
    while tl.max(high - low, 0) > 0:
        middle = (low + high) // 2
        searching = low < high
        entry = tl.load(entries + line * entries_a_line + middle, mask=searching, other=0)
        lower = searching & (entry < wanted)
        low = tl.where(lower, middle + 1, low)
        high = tl.where(searching & (entry >= wanted), middle, high)
    tl.store(bounds + tl.program_id(0).to(tl.int64) * (PIECES + 1) + place, low, mask=place <= PIECES)

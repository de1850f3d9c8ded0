"""Adds up the partial results of a query's slots, always in the same order: out by softmax weights, dQ plainly.

A program by key block writes its partial results one behind the other, in its list's order, and notes in `places`
where those of each (query, slot) begin: the rows of its GROUP heads. Here a program gathers the slots of a few rows
(query, head), several at once.
"""

import triton
import triton.language as tl
from torch import Tensor

from kernels.backends.triton.common import LN_2
from kernels.backends.triton.selection.launch_settings import SumConfig


def add_slots(
    partial: Tensor,
    partial_lse: Tensor | None,
    places: Tensor,
    result: Tensor,
    lse: Tensor | None,
    first_query: int,
    group: int,
    scale: float,
    config: SumConfig,
) -> None:
    """Fills `result` `[batch, heads, queries, head_dim]` for the queries of a piece, from `first_query` on.

    partial `[rows, head_dim]`. places int32 `[lines, queries of a piece, slots]`: the first row of a slot's results;
    -1: none. With partial_lse `[rows]` (base 2) it is the softmax's combination, and `lse` `[batch, heads, queries]`
    is filled, too; without, the sum times `scale`.
    """
    _, heads, queries, head_dim = result.shape
    lines, piece, slots = places.shape
    columns = triton.next_power_of_2(head_dim)
    _add_slots[(triton.cdiv(min(piece, queries - first_query) * group, config.rows), lines)](
        partial,
        partial if partial_lse is None else partial_lse,
        places,
        result,
        partial if lse is None else lse,
        *result.stride()[:3],
        scale,
        queries,
        heads // group,
        heads,
        first_query,
        piece,
        SLOTS=slots,
        KEPT=triton.next_power_of_2(slots),
        GROUP=group,
        HEAD_DIM=head_dim,
        D=columns,
        M=config.rows,
        SOFTMAX=partial_lse is not None,
        num_warps=config.warps,
    )


@triton.jit(do_not_specialize=["queries", "selectors", "heads", "first_query", "piece"])
def _add_slots(
    partial,
    partial_lse,
    places,
    result,
    lse,
    result_batch,
    result_head,
    result_step,
    scale,
    queries,
    selectors,
    heads,
    first_query,
    piece,
    SLOTS: tl.constexpr,
    KEPT: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    D: tl.constexpr,
    M: tl.constexpr,
    SOFTMAX: tl.constexpr,
):
    line = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * M + tl.arange(0, M)
    query = row // GROUP  # of the piece
    head = row % GROUP
    live = (query < piece) & (first_query + query < queries)
    to_places = places + (line * piece + query) * SLOTS
    column = tl.arange(0, D)
    within = (column < HEAD_DIM)[None, :]
    batch = line // selectors
    head_index = (line % selectors) * GROUP + head
    if SOFTMAX:
        every = tl.arange(0, KEPT)
        begins = tl.load(to_places[None, :] + every[:, None], live[None, :] & (every < SLOTS)[:, None], -1)
        x = tl.load(partial_lse + begins + head[None, :], begins >= 0, float("-inf"))
        highest = tl.max(x, 0)
        finite = tl.where(highest == float("-inf"), 0.0, highest)
        total = tl.sum(tl.exp2(x - finite[None, :]), 0)
        seen = total != 0  # a NaN is seen
        total = tl.where(seen, finite + tl.log2(tl.where(seen, total, 1.0)), float("inf"))
        at = (batch * heads + head_index) * queries + first_query + query
        tl.store(lse + at, tl.where(seen, total * LN_2, float("-inf")), live)
    acc = tl.zeros([M, D], tl.float32)
    for first in tl.range(0, SLOTS, 4):
        # Four slots are asked for before the first is used.
        at_0, there_0, part_0 = _part(partial, to_places, first, head, live, within, column, SLOTS, HEAD_DIM)
        at_1, there_1, part_1 = _part(partial, to_places, first + 1, head, live, within, column, SLOTS, HEAD_DIM)
        at_2, there_2, part_2 = _part(partial, to_places, first + 2, head, live, within, column, SLOTS, HEAD_DIM)
        at_3, there_3, part_3 = _part(partial, to_places, first + 3, head, live, within, column, SLOTS, HEAD_DIM)
        if SOFTMAX:
            acc += tl.exp2(tl.load(partial_lse + at_0, there_0, float("-inf")) - total)[:, None] * part_0.to(tl.float32)
            acc += tl.exp2(tl.load(partial_lse + at_1, there_1, float("-inf")) - total)[:, None] * part_1.to(tl.float32)
            acc += tl.exp2(tl.load(partial_lse + at_2, there_2, float("-inf")) - total)[:, None] * part_2.to(tl.float32)
            acc += tl.exp2(tl.load(partial_lse + at_3, there_3, float("-inf")) - total)[:, None] * part_3.to(tl.float32)
        else:
            acc += part_0.to(tl.float32)
            acc += part_1.to(tl.float32)
            acc += part_2.to(tl.float32)
            acc += part_3.to(tl.float32)
    if not SOFTMAX:
        acc *= scale
    to = result + batch * result_batch + head_index * result_head + (first_query + query).to(tl.int64) * result_step
    tl.store(
        to[:, None] + column[None, :],
        acc.to(result.dtype.element_ty),
        live[:, None] & within,
    )


@triton.jit
def _part(partial, to_places, slot, head, live, within, column, SLOTS: tl.constexpr, HEAD_DIM: tl.constexpr):
    """(rows, whether they are there, values) of one slot of each row."""
    place = tl.load(to_places + slot, live & (slot < SLOTS), -1)
    there = place >= 0
    at = place + head
    rows = tl.load(partial + at.to(tl.int64)[:, None] * HEAD_DIM + column[None, :], there[:, None] & within, 0.0)
    return at, there, rows

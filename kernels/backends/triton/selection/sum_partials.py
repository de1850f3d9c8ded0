"""Combines the partial results of a query's slots, always in the same order: out by softmax weights, dQ as a sum.

The program of a key block writes its partial results consecutively, in the order of the block's list, and stores in
`first_rows` where those of each (query, slot) begin: GROUP rows, one per head. Here, a program gathers the slots of a
few rows (query, head), four slots at a time.
"""

import triton
import triton.language as tl
from torch import Tensor

from kernels.backends.triton.common import LN_2
from kernels.backends.triton.selection.launch_settings import SumConfig


def combine_slots(
    partial: Tensor,
    partial_lse: Tensor | None,
    first_rows: Tensor,
    result: Tensor,
    lse: Tensor | None,
    first_query: int,
    group: int,
    scale: float,
    config: SumConfig,
) -> None:
    """Fills `result` `[batch, heads, queries, head_dim]` for one chunk of queries that begins at `first_query`.

    partial `[rows, head_dim]`. first_rows int32 `[batch * selectors, queries of a chunk, slots]`: the first row of a
    slot's results; -1: unused. With partial_lse `[rows]` (base 2), the results are combined by softmax, and `lse`
    `[batch, heads, queries]` is filled, too. Without it, the result is the sum times `scale`.
    """
    _, heads, queries, head_dim = result.shape
    batch_selectors, queries_per_chunk, slots = first_rows.shape
    columns = triton.next_power_of_2(head_dim)
    _combine_slots[(triton.cdiv(min(queries_per_chunk, queries - first_query) * group, config.rows), batch_selectors)](
        partial,
        partial if partial_lse is None else partial_lse,
        first_rows,
        result,
        partial if lse is None else lse,
        *result.stride()[:3],
        scale,
        queries,
        heads // group,
        heads,
        first_query,
        queries_per_chunk,
        SLOTS=slots,
        KEPT=triton.next_power_of_2(slots),
        GROUP=group,
        HEAD_DIM=head_dim,
        D=columns,
        M=config.rows,
        SOFTMAX=partial_lse is not None,
        num_warps=config.warps,
    )


@triton.jit(do_not_specialize=["queries", "selectors", "heads", "first_query", "queries_per_chunk"])
def _combine_slots(
    partial,
    partial_lse,
    first_rows,
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
    queries_per_chunk,
    SLOTS: tl.constexpr,
    KEPT: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    D: tl.constexpr,
    M: tl.constexpr,
    SOFTMAX: tl.constexpr,
):
    batch_selector = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * M + tl.arange(0, M)
    query = row // GROUP  # within the chunk
    head = row % GROUP
    live = (query < queries_per_chunk) & (first_query + query < queries)
    to_first_rows = first_rows + (batch_selector * queries_per_chunk + query) * SLOTS
    column = tl.arange(0, D)
    within = (column < HEAD_DIM)[None, :]
    batch = batch_selector // selectors
    head_index = (batch_selector % selectors) * GROUP + head
    if SOFTMAX:
        every = tl.arange(0, KEPT)
        begins = tl.load(to_first_rows[None, :] + every[:, None], live[None, :] & (every < SLOTS)[:, None], -1)
        x = tl.load(partial_lse + begins + head[None, :], begins >= 0, float("-inf"))
        highest = tl.max(x, 0)
        finite = tl.where(highest == float("-inf"), 0.0, highest)
        total = tl.sum(tl.exp2(x - finite[None, :]), 0)
        seen = total != 0  # True for NaN, too
        total = tl.where(seen, finite + tl.log2(tl.where(seen, total, 1.0)), float("inf"))
        at = (batch * heads + head_index) * queries + first_query + query
        tl.store(lse + at, tl.where(seen, total * LN_2, float("-inf")), live)
    acc = tl.zeros([M, D], tl.float32)
    for first in tl.range(0, SLOTS, 4):
        # Four slots are loaded before the first is used.
        at_0, used_0, values_0 = _load_slot(partial, to_first_rows, first, head, live, within, column, SLOTS, HEAD_DIM)
        at_1, used_1, values_1 = _load_slot(
            partial, to_first_rows, first + 1, head, live, within, column, SLOTS, HEAD_DIM
        )
        at_2, used_2, values_2 = _load_slot(
            partial, to_first_rows, first + 2, head, live, within, column, SLOTS, HEAD_DIM
        )
        at_3, used_3, values_3 = _load_slot(
            partial, to_first_rows, first + 3, head, live, within, column, SLOTS, HEAD_DIM
        )
        if SOFTMAX:
            acc += tl.exp2(tl.load(partial_lse + at_0, used_0, float("-inf")) - total)[:, None] * values_0.to(
                tl.float32
            )
            acc += tl.exp2(tl.load(partial_lse + at_1, used_1, float("-inf")) - total)[:, None] * values_1.to(
                tl.float32
            )
            acc += tl.exp2(tl.load(partial_lse + at_2, used_2, float("-inf")) - total)[:, None] * values_2.to(
                tl.float32
            )
            acc += tl.exp2(tl.load(partial_lse + at_3, used_3, float("-inf")) - total)[:, None] * values_3.to(
                tl.float32
            )
        else:
            acc += values_0.to(tl.float32)
            acc += values_1.to(tl.float32)
            acc += values_2.to(tl.float32)
            acc += values_3.to(tl.float32)
    if not SOFTMAX:
        acc *= scale
    to = result + batch * result_batch + head_index * result_head + (first_query + query).to(tl.int64) * result_step
    tl.store(
        to[:, None] + column[None, :],
        acc.to(result.dtype.element_ty),
        live[:, None] & within,
    )


@triton.jit
def _load_slot(partial, to_first_rows, slot, head, live, within, column, SLOTS: tl.constexpr, HEAD_DIM: tl.constexpr):
    """(first rows, whether the slot is used, values) of one slot of each row."""
    place = tl.load(to_first_rows + slot, live & (slot < SLOTS), -1)
    used = place >= 0
    at = place + head
    rows = tl.load(partial + at.to(tl.int64)[:, None] * HEAD_DIM + column[None, :], used[:, None] & within, 0.0)
    return at, used, rows

"""The forward pass by key block (see selected.py): partial results, and their combination."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.backends.triton.common import LN_2, LOG2_E
from kernels.backends.triton.selected_configs import choose
from kernels.backends.triton.selected_plan import SELECTED_ITEM, SelectedPlan
from kernels.routing import Selection


def forward(
    q: Tensor, k: Tensor, v: Tensor, selection: Selection, plan: SelectedPlan, scale: float, config=None
) -> tuple[Tensor, Tensor]:
    """(out, lse); scale > 0. `config` is for benchmarks."""
    batch, heads, queries, head_dim = q.shape
    selectors, slots = selection.selectors, selection.slots
    group, lines = heads // selectors, batch * selectors
    config = config or choose("forward", q.dtype, head_dim, group)
    columns = triton.next_power_of_2(head_dim)
    out = torch.empty_like(q)
    lse = torch.empty(batch, heads, queries, dtype=torch.float32, device=q.device)
    rows = plan.piece * slots * group
    partial_out = torch.empty(lines, rows, head_dim, dtype=q.dtype, device=q.device)
    partial_lse = torch.empty(lines, rows, dtype=torch.float32, device=q.device)
    for piece in range(plan.pieces):
        first_query = piece * plan.piece
        _forward[(plan.items.shape[1],)](
            q,
            k,
            v,
            plan.items[piece],
            selection.entries,
            selection.first_key,
            partial_out,
            partial_lse,
            *q.stride()[:3],
            *k.stride()[:3],
            *v.stride()[:3],
            scale * LOG2_E,
            queries,
            k.shape[2],
            selection.offsets.shape[2] - 1,
            selectors,
            selectors // k.shape[1],
            first_query,
            rows,
            SLOTS=slots,
            GROUP=group,
            BLOCK=selection.block,
            HEAD_DIM=head_dim,
            D=columns,
            M=config.rows,
            PRECISION="ieee" if q.dtype == torch.float32 else "tf32",
            num_warps=config.warps,
            num_stages=config.stages,
            maxnreg=config.registers,
        )
        combined = max(16, 32 // max(1, columns // 64))
        _combine[(triton.cdiv(min(plan.piece, queries - first_query) * group, combined), lines)](
            partial_out,
            partial_lse,
            selection.chosen,
            out,
            lse,
            *out.stride()[:3],
            queries,
            selectors,
            heads,
            first_query,
            rows,
            SLOTS=slots,
            KEPT=triton.next_power_of_2(slots),
            GROUP=group,
            HEAD_DIM=head_dim,
            D=columns,
            M=combined,
            num_warps=4,
        )
    return out, lse


COUNTS = ["queries", "keys", "blocks", "selectors", "selectors_a_kv_head", "first_query", "rows", "heads"]


@triton.jit(do_not_specialize=COUNTS)
def _forward(
    q,
    k,
    v,
    items,
    entries,
    first_key,
    partial_out,
    partial_lse,
    q_batch,
    q_head,
    q_step,
    k_batch,
    k_head,
    k_step,
    v_batch,
    v_head,
    v_step,
    log2_scale,
    queries,
    keys,
    blocks,
    selectors,
    selectors_a_kv_head,
    first_query,
    rows,
    SLOTS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    D: tl.constexpr,
    M: tl.constexpr,
    PRECISION: tl.constexpr,
):
    item = items + tl.program_id(0) * SELECTED_ITEM
    count = tl.load(item + 2)
    if count == 0:
        return
    line = tl.load(item) // blocks
    block = tl.load(item) % blocks
    batch = (line // selectors).to(tl.int64)
    selector = line % selectors
    kv_head = (selector // selectors_a_kv_head).to(tl.int64)
    line = line.to(tl.int64)
    list_of = entries + line * queries * SLOTS + tl.load(item + 1)

    column = tl.arange(0, D)
    key = block * BLOCK + tl.arange(0, BLOCK)
    inside = (key < keys)[:, None] & (column < HEAD_DIM)[None, :]
    kb = tl.load(
        k + batch * k_batch + kv_head * k_head + key.to(tl.int64)[:, None] * k_step + column[None, :], inside, 0.0
    )
    vb = tl.load(
        v + batch * v_batch + kv_head * v_head + key.to(tl.int64)[:, None] * v_step + column[None, :], inside, 0.0
    )
    q_base = q + batch * q_batch + (selector * GROUP).to(tl.int64) * q_head
    line_rows = line * rows
    for start in tl.range(0, count * GROUP, M):
        row = start + tl.arange(0, M)
        live = row < count * GROUP
        entry = tl.load(list_of + row // GROUP, live, 0)
        query = entry // SLOTS
        head = row % GROUP
        address = query.to(tl.int64) * q_step + head.to(tl.int64) * q_head
        qb = tl.load(q_base + address[:, None] + column[None, :], live[:, None] & (column < HEAD_DIM)[None, :], 0.0)
        s = tl.dot(qb, kb.T, input_precision=PRECISION) * log2_scale
        first = tl.load(first_key + batch * queries + query, live, 0)
        # Of a block in which the document begins, its own tokens alone; the last one always is.
        if tl.max(first, 0) > block * BLOCK:
            s = tl.where(key[None, :] >= first[:, None], s, float("-inf"))
        m = tl.max(s, 1)
        p = tl.exp2(s - m[:, None])
        total = tl.sum(p, 1)
        o = tl.dot(p.to(vb.dtype), vb, input_precision=PRECISION) / total[:, None]
        to = line_rows + (entry.to(tl.int64) - first_query.to(tl.int64) * SLOTS) * GROUP + head
        tl.store(
            partial_out + to[:, None] * HEAD_DIM + column[None, :],
            o.to(partial_out.dtype.element_ty),
            live[:, None] & (column < HEAD_DIM)[None, :],
        )
        tl.store(partial_lse + to, m + tl.log2(total), live)


@triton.jit(do_not_specialize=COUNTS)
def _combine(
    partial_out,
    partial_lse,
    chosen,
    out,
    lse,
    out_batch,
    out_head,
    out_step,
    queries,
    selectors,
    heads,
    first_query,
    rows,
    SLOTS: tl.constexpr,
    KEPT: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    D: tl.constexpr,
    M: tl.constexpr,
):
    """One softmax of a query's slots, in their order; rows are (query, head)."""
    line = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * M + tl.arange(0, M)
    query = first_query + row // GROUP
    head = row % GROUP
    live = (query < queries) & (row < rows // SLOTS)
    slot = tl.arange(0, KEPT)
    choice = chosen + (line * queries + query) * SLOTS
    from_row = line * rows + (row // GROUP).to(tl.int64) * SLOTS * GROUP + head
    there = live[:, None] & (slot < SLOTS)[None, :]
    there = there & (tl.load(choice[:, None] + slot[None, :], there, -1) >= 0)
    x = tl.load(partial_lse + from_row[:, None] + slot[None, :] * GROUP, there, float("-inf"))
    highest = tl.max(x, 1)
    finite = tl.where(highest == float("-inf"), 0.0, highest)
    total = tl.sum(tl.exp2(x - finite[:, None]), 1)
    seen = total > 0
    total = tl.where(seen, finite + tl.log2(tl.where(seen, total, 1.0)), float("inf"))
    column = tl.arange(0, D)
    acc = tl.zeros([M, D], tl.float32)
    for i in tl.range(0, SLOTS):
        taken = live & (tl.load(choice + i, live, -1) >= 0)
        weight = tl.exp2(tl.load(partial_lse + from_row + i * GROUP, taken, float("-inf")) - total)
        part = tl.load(
            partial_out + (from_row + i * GROUP)[:, None] * HEAD_DIM + column[None, :],
            taken[:, None] & (column < HEAD_DIM)[None, :],
            0.0,
        )
        acc += weight[:, None] * part.to(tl.float32)
    batch = line // selectors
    head_index = (line % selectors) * GROUP + head
    to = out + batch * out_batch + head_index * out_head + query.to(tl.int64) * out_step
    tl.store(
        to[:, None] + column[None, :],
        acc.to(out.dtype.element_ty),
        live[:, None] & (column < HEAD_DIM)[None, :],
    )
    tl.store(lse + (batch * heads + head_index) * queries + query, tl.where(seen, total * LN_2, float("-inf")), live)

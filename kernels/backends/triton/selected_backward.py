"""The backward pass by key block (see selected.py): dK and dV in the program that holds the block, partial dQ."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.backends.triton.common import LOG2_E
from kernels.backends.triton.selected_configs import choose
from kernels.backends.triton.selected_plan import SELECTED_ITEM, SelectedPlan
from kernels.routing import Selection


def backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rows_of: Tensor,
    selection: Selection,
    plan: SelectedPlan,
    scale: float,
    config=None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv); rows_of from backward.prepare; scale > 0. `config` is for benchmarks."""
    batch, heads, queries, head_dim = q.shape
    kv_heads, keys = k.shape[1:3]
    selectors, slots, block = selection.selectors, selection.slots, selection.block
    group, lines, blocks = heads // selectors, batch * selectors, selection.offsets.shape[2] - 1
    config = config or choose("backward", q.dtype, head_dim, group)
    columns = triton.next_power_of_2(head_dim)
    rows = plan.piece * slots * group
    dq = torch.empty_like(q)
    partial_dq = torch.empty(lines, rows, head_dim, dtype=q.dtype, device=q.device)
    # A block's program is the only one to add to it, piece of queries after piece.
    grads = torch.zeros(2, lines, blocks * block, head_dim, dtype=torch.float32, device=q.device)
    sums = torch.empty(max(plan.slots, 1), 2, block, head_dim, dtype=torch.float32, device=q.device)
    for piece in range(plan.pieces):
        first_query = piece * plan.piece
        _backward[(plan.items.shape[1],)](
            q,
            k,
            v,
            grad_out,
            rows_of,
            plan.items[piece],
            selection.entries,
            selection.first_key,
            partial_dq,
            grads,
            sums,
            *q.stride()[:3],
            *k.stride()[:3],
            *v.stride()[:3],
            *grad_out.stride()[:3],
            scale * LOG2_E,
            queries,
            keys,
            blocks,
            lines,
            selectors,
            selectors // kv_heads,
            heads,
            first_query,
            rows,
            rows_of.shape[-1],
            SLOTS=slots,
            GROUP=group,
            BLOCK=block,
            HEAD_DIM=head_dim,
            D=columns,
            M=config.rows,
            PRECISION="ieee" if q.dtype == torch.float32 else "tf32",
            num_warps=config.warps,
            num_stages=config.stages,
            maxnreg=config.registers,
        )
        if plan.slots:
            lines_at_once = min(16, block)
            _add_cuts[(lines * blocks, block // lines_at_once)](
                sums,
                plan.cuts[piece],
                grads,
                lines * blocks,
                BLOCK=block,
                HEAD_DIM=head_dim,
                D=columns,
                M=lines_at_once,
                num_warps=4,
            )
        added = max(16, 32 // max(1, columns // 64))
        _add_slots[(triton.cdiv(min(plan.piece, queries - first_query) * group, added), lines)](
            partial_dq,
            selection.chosen,
            dq,
            *dq.stride()[:3],
            scale,
            queries,
            selectors,
            first_query,
            rows,
            SLOTS=slots,
            GROUP=group,
            HEAD_DIM=head_dim,
            D=columns,
            M=added,
            num_warps=4,
        )
    # Selectors of one KV head add up; keys beyond the end were padding.
    grads = grads.view(2, batch, kv_heads, selectors // kv_heads, blocks * block, head_dim)
    grads = grads[:, :, :, 0] if selectors == kv_heads else grads.sum(3)
    dk, dv = grads[0, :, :, :keys].mul_(scale), grads[1, :, :, :keys]
    return dq, torch.empty_like(k).copy_(dk), torch.empty_like(v).copy_(dv)


COUNTS = [
    *("queries", "keys", "blocks", "lines", "selectors", "selectors_a_kv_head", "heads"),
    *("first_query", "rows", "padded"),
]


@triton.jit(do_not_specialize=COUNTS)
def _backward(
    q,
    k,
    v,
    do,
    rows_of,
    items,
    entries,
    first_key,
    partial_dq,
    grads,
    sums,
    q_batch,
    q_head,
    q_step,
    k_batch,
    k_head,
    k_step,
    v_batch,
    v_head,
    v_step,
    do_batch,
    do_head,
    do_step,
    log2_scale,
    queries,
    keys,
    blocks,
    lines,
    selectors,
    selectors_a_kv_head,
    heads,
    first_query,
    rows,
    padded,
    SLOTS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    D: tl.constexpr,
    M: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # dK and dQ are left without the factor `scale`.
    item = items + tl.program_id(0) * SELECTED_ITEM
    count = tl.load(item + 2)
    if count == 0:
        return
    list_index = tl.load(item)
    line = list_index // blocks
    block = list_index % blocks
    batch = (line // selectors).to(tl.int64)
    selector = line % selectors
    kv_head = (selector // selectors_a_kv_head).to(tl.int64)
    line = line.to(tl.int64)
    list_of = entries + line * queries * SLOTS + tl.load(item + 1)
    slot = tl.load(item + 3)

    column = tl.arange(0, D)
    within = (column < HEAD_DIM)[None, :]
    line_in_block = tl.arange(0, BLOCK)
    key = block * BLOCK + line_in_block
    inside = (key < keys)[:, None] & within
    kb = tl.load(
        k + batch * k_batch + kv_head * k_head + key.to(tl.int64)[:, None] * k_step + column[None, :], inside, 0.0
    )
    vb = tl.load(
        v + batch * v_batch + kv_head * v_head + key.to(tl.int64)[:, None] * v_step + column[None, :], inside, 0.0
    )
    first_head = selector * GROUP
    q_base = q + batch * q_batch + first_head.to(tl.int64) * q_head
    do_base = do + batch * do_batch + first_head.to(tl.int64) * do_head
    rows_base = rows_of + (batch * heads + first_head) * 2 * padded
    line_rows = line * rows
    dk = tl.zeros([BLOCK, D], tl.float32)
    dv = tl.zeros([BLOCK, D], tl.float32)
    for start in tl.range(0, count * GROUP, M):
        row = start + tl.arange(0, M)
        live = row < count * GROUP
        entry = tl.load(list_of + row // GROUP, live, 0)
        query = entry // SLOTS
        head = row % GROUP
        wide_query = query.to(tl.int64)
        wide_head = head.to(tl.int64)
        there = live[:, None] & within
        qb = tl.load(q_base + (wide_query * q_step + wide_head * q_head)[:, None] + column[None, :], there, 0.0)
        dob = tl.load(do_base + (wide_query * do_step + wide_head * do_head)[:, None] + column[None, :], there, 0.0)
        at = rows_base + wide_head * 2 * padded + wide_query
        lse = tl.load(at, live, float("inf"))  # weights of 0 beyond the list
        delta = tl.load(at + padded, live, 0.0)
        first = tl.load(first_key + batch * queries + query, live, 0)
        st = tl.dot(kb, qb.T, input_precision=PRECISION)
        if tl.max(first, 0) > block * BLOCK:
            st = tl.where(key[:, None] >= first[None, :], st, float("-inf"))
        pt = tl.exp2(st * log2_scale - lse[None, :])
        dv = tl.dot(pt.to(dob.dtype), dob, dv, input_precision=PRECISION)
        dpt = tl.dot(vb, dob.T, input_precision=PRECISION)
        dst = (pt * (dpt - delta[None, :])).to(qb.dtype)
        dk = tl.dot(dst, qb, dk, input_precision=PRECISION)
        dq = tl.dot(dst.T, kb, input_precision=PRECISION)
        to = line_rows + (entry.to(tl.int64) - first_query.to(tl.int64) * SLOTS) * GROUP + head
        tl.store(partial_dq + to[:, None] * HEAD_DIM + column[None, :], dq.to(partial_dq.dtype.element_ty), there)

    offset = line_in_block[:, None] * HEAD_DIM + column[None, :]
    if slot >= 0:
        to_sum = sums + slot.to(tl.int64) * 2 * BLOCK * HEAD_DIM + offset
        tl.store(to_sum, dk, within)
        tl.store(to_sum + BLOCK * HEAD_DIM, dv, within)
    else:
        to_grad = grads + list_index.to(tl.int64) * BLOCK * HEAD_DIM + offset
        second = lines.to(tl.int64) * blocks * BLOCK * HEAD_DIM
        tl.store(to_grad, tl.load(to_grad, within, 0.0) + dk, within)
        tl.store(to_grad + second, tl.load(to_grad + second, within, 0.0) + dv, within)


@triton.jit(do_not_specialize=["lists"])
def _add_cuts(
    sums,
    cuts,
    grads,
    lists,
    BLOCK: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    D: tl.constexpr,
    M: tl.constexpr,
):
    """dK and dV of the blocks whose list was cut: their items' sums, always in the same order."""
    count = tl.load(cuts + tl.program_id(0) * 2 + 1)
    if count == 0:
        return
    slot = tl.load(cuts + tl.program_id(0) * 2).to(tl.int64)
    column = tl.arange(0, D)
    within = (column < HEAD_DIM)[None, :]
    offset = (tl.program_id(1) * M + tl.arange(0, M))[:, None] * HEAD_DIM + column[None, :]
    to_k = grads + tl.program_id(0).to(tl.int64) * BLOCK * HEAD_DIM + offset
    to_v = to_k + lists.to(tl.int64) * BLOCK * HEAD_DIM
    sum_k = tl.load(to_k, within, 0.0)
    sum_v = tl.load(to_v, within, 0.0)
    at = sums + slot * 2 * BLOCK * HEAD_DIM + offset
    for _ in range(0, count):
        sum_k += tl.load(at, within, 0.0)
        sum_v += tl.load(at + BLOCK * HEAD_DIM, within, 0.0)
        at += 2 * BLOCK * HEAD_DIM
    tl.store(to_k, sum_k, within)
    tl.store(to_v, sum_v, within)


@triton.jit(do_not_specialize=["queries", "selectors", "first_query", "rows"])
def _add_slots(
    partial_dq,
    chosen,
    dq,
    dq_batch,
    dq_head,
    dq_step,
    scale,
    queries,
    selectors,
    first_query,
    rows,
    SLOTS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    D: tl.constexpr,
    M: tl.constexpr,
):
    """dQ: the sum over a query's slots, in their order; rows are (query, head)."""
    line = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * M + tl.arange(0, M)
    query = first_query + row // GROUP
    head = row % GROUP
    live = (query < queries) & (row < rows // SLOTS)
    choice = chosen + (line * queries + query) * SLOTS
    from_row = line * rows + (row // GROUP).to(tl.int64) * SLOTS * GROUP + head
    column = tl.arange(0, D)
    within = (column < HEAD_DIM)[None, :]
    acc = tl.zeros([M, D], tl.float32)
    for i in tl.range(0, SLOTS):
        taken = live & (tl.load(choice + i, live, -1) >= 0)
        part = tl.load(
            partial_dq + (from_row + i * GROUP)[:, None] * HEAD_DIM + column[None, :], taken[:, None] & within, 0.0
        )
        acc += part.to(tl.float32)
    head_index = (line % selectors) * GROUP + head
    to = dq + (line // selectors) * dq_batch + head_index * dq_head + query.to(tl.int64) * dq_step
    tl.store(to[:, None] + column[None, :], (acc * scale).to(dq.dtype.element_ty), live[:, None] & within)

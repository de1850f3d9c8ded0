"""The forward pass by key block (see __init__.py): partial results, which sum_partials.py combines."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.backends.triton.common import LOG2_E
from kernels.backends.triton.selection.launch_settings import SelectionConfig, SumConfig, choose, choose_sum
from kernels.backends.triton.selection.sum_partials import combine_slots
from kernels.backends.triton.selection.work_items import (
    ITEM_FIELDS,
    SelectionPlan,
    describe_partials,
    entry_and_head,
    make_plan,
)
from kernels.layout.selection import Selection


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    selection: Selection,
    scale: float,
    config: SelectionConfig | None = None,
    sums: SumConfig | None = None,
    queries_per_chunk: int | None = None,
) -> tuple[Tensor, Tensor]:
    """(out, lse); scale > 0. config, sums and `queries_per_chunk` are for benchmarks."""
    batch, heads, queries, head_dim = q.shape
    selectors, slots = selection.selectors, selection.slots
    group, batch_selectors = heads // selectors, batch * selectors
    config = config or choose("forward", q.dtype, head_dim)
    sums = sums or choose_sum(head_dim)
    step = config.rows if config.tma_store else 1
    plan = make_plan(selection, group, group * head_dim * q.element_size(), queries_per_chunk, step)
    out = torch.empty_like(q)
    lse = torch.empty(batch, heads, queries, dtype=torch.float32, device=q.device)
    partial_out = torch.empty(plan.rows, head_dim, dtype=q.dtype, device=q.device)
    partial_lse = torch.empty(plan.rows, dtype=torch.float32, device=q.device)
    first_rows = torch.empty(batch_selectors, plan.queries_per_chunk, slots, dtype=torch.int32, device=q.device)
    partials = partial_out, partial_lse, first_rows
    for index in range(plan.chunks):
        first_rows.fill_(-1)
        partials_of_chunk(q, k, v, selection, plan, index, scale, config, *partials)
        combine_slots(*partials, out, lse, index * plan.queries_per_chunk, group, 1.0, sums)
    return out, lse


def partials_of_chunk(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    selection: Selection,
    plan: SelectionPlan,
    index: int,
    scale: float,
    config: SelectionConfig,
    partial_out: Tensor,
    partial_lse: Tensor,
    first_rows: Tensor,
) -> None:
    """Writes the inputs of `combine_slots` for chunk `index` of the queries."""
    head_dim, selectors = q.shape[-1], selection.selectors
    columns = triton.next_power_of_2(head_dim)
    _forward[(plan.items.shape[1],)](
        q,
        k,
        v,
        plan.items[index],
        selection.entries,
        selection.document_start,
        describe_partials(partial_out, config.rows, columns) if config.tma_store else partial_out,
        partial_lse,
        first_rows,
        *q.stride()[:3],
        *k.stride()[:3],
        *v.stride()[:3],
        scale * LOG2_E,
        q.shape[2],
        k.shape[2],
        selection.offsets.shape[2] - 1,
        selectors,
        selectors // k.shape[1],
        index * plan.queries_per_chunk,
        plan.queries_per_chunk,
        SLOTS=selection.slots,
        GROUP=q.shape[1] // selectors,
        BLOCK=selection.block,
        HEAD_DIM=head_dim,
        D=columns,
        M=config.rows,
        TMA_STORE=config.tma_store,
        PRECISION="ieee" if q.dtype == torch.float32 else "tf32",
        num_warps=config.warps,
        num_stages=config.stages,
        maxnreg=config.registers,
    )


@triton.jit(
    do_not_specialize=[
        "queries",
        "keys",
        "blocks",
        "selectors",
        "selectors_per_kv_head",
        "first_query",
        "queries_per_chunk",
    ]
)
def _forward(
    q,
    k,
    v,
    items,
    entries,
    document_start,
    partial_out,
    partial_lse,
    first_rows,
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
    selectors_per_kv_head,
    first_query,
    queries_per_chunk,
    SLOTS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    D: tl.constexpr,
    M: tl.constexpr,
    TMA_STORE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    item = items + tl.program_id(0) * ITEM_FIELDS
    count = tl.load(item + 2)
    if count == 0:
        return
    batch_selector = tl.load(item) // blocks
    block = tl.load(item) % blocks
    first_row = tl.load(item + 4)
    batch = (batch_selector // selectors).to(tl.int64)
    selector = batch_selector % selectors
    kv_head = (selector // selectors_per_kv_head).to(tl.int64)
    batch_selector = batch_selector.to(tl.int64)
    list_of = entries + batch_selector * queries * SLOTS + tl.load(item + 1)
    # If a document begins within the block, the queries that chose the block see only that document's tokens.
    first = tl.load(document_start + batch * queries + tl.load(list_of) // SLOTS)

    column = tl.arange(0, D)
    within = (column < HEAD_DIM)[None, :]
    key = block * BLOCK + tl.arange(0, BLOCK)
    inside = ((key < keys) & (key >= first))[:, None] & within  # a hidden key may hold NaN
    wide_key = key.to(tl.int64)[:, None]
    kb = tl.load(k + batch * k_batch + kv_head * k_head + wide_key * k_step + column[None, :], inside, 0.0)
    vb = tl.load(v + batch * v_batch + kv_head * v_head + wide_key * v_step + column[None, :], inside, 0.0)
    q_base = q + batch * q_batch + (selector * GROUP).to(tl.int64) * q_head
    first_rows += (batch_selector * queries_per_chunk - first_query) * SLOTS
    # The next entries are loaded one step early, so that their rows can be loaded while this step computes.
    index, head = entry_and_head(0, M, GROUP)
    entry = tl.load(list_of + tl.minimum(index, count - 1))
    for start in tl.range(0, count * GROUP, M):
        index, head = entry_and_head(start, M, GROUP)
        live = index < count  # after the end, the last entry is repeated and not stored
        address = (entry // SLOTS).to(tl.int64) * q_step + head.to(tl.int64) * q_head
        qb = tl.load(q_base + address[:, None] + column[None, :], within, 0.0)
        next_index, _ = entry_and_head(start + M, M, GROUP)
        next_entry = tl.load(list_of + tl.minimum(next_index, count - 1))
        s = tl.dot(qb, kb.T, input_precision=PRECISION)
        if first > block * BLOCK:
            s = tl.where((key >= first)[None, :], s, float("-inf"))
        m = tl.max(s, 1) * log2_scale
        p = tl.exp2(s * log2_scale - m[:, None])
        total = tl.sum(p, 1)
        o = tl.dot(p.to(vb.dtype), vb, input_precision=PRECISION) * (1.0 / total)[:, None]
        to = first_row + start + tl.arange(0, M)
        if TMA_STORE:
            partial_out.store([first_row + start, 0], o.to(q.dtype.element_ty))
        else:
            tl.store(
                partial_out + to.to(tl.int64)[:, None] * HEAD_DIM + column[None, :],
                o.to(q.dtype.element_ty),
                live[:, None] & within,
                eviction_policy="evict_first",  # read only once, later: the cache should keep q
            )
        tl.store(partial_lse + to, m + tl.log2(total), live)
        tl.store(first_rows + entry, to, live & (head == 0))
        entry = next_entry

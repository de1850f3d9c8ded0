"""The backward pass of attention on a Selection, by key block (see __init__.py).

The program of a block computes the block's dK and dV and writes partial dQ, which sum_partials.py combines. The kernels
are in gradient_kernels.py.
"""

import torch
import triton
from torch import Tensor

from kernels.backends.triton.common import LOG2_E
from kernels.backends.triton.selection.gradient_kernels import block_gradients, sum_split_lists
from kernels.backends.triton.selection.launch_settings import SelectionConfig, SumConfig, choose, choose_sum
from kernels.backends.triton.selection.sum_partials import combine_slots
from kernels.backends.triton.selection.work_items import (
    SelectionPlan,
    describe_partials,
    make_plan,
)
from kernels.layout.selection import Selection

ROWS_PER_ITEM = 4096
"""As work_items.ROWS_PER_ITEM, for the backward pass, in which each item also writes gradients of K and V once."""


def backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    row_stats: Tensor,
    selection: Selection,
    scale: float,
    config: SelectionConfig | None = None,
    sums: SumConfig | None = None,
    queries_per_chunk: int | None = None,
    rows_per_item: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv), like q, k, v.

    row_stats comes from `by_query`; scale > 0. The later arguments are for benchmarks (see partial_outputs.py).
    """
    (batch, heads), head_dim = q.shape[:2], q.shape[-1]
    kv_heads, keys = k.shape[1:3]
    selectors, slots, block = selection.selectors, selection.slots, selection.block
    group, batch_selectors, blocks = heads // selectors, batch * selectors, selection.offsets.shape[2] - 1
    config = config or choose("backward", q.dtype, head_dim)
    sums = sums or choose_sum(head_dim)
    step = config.rows if config.tma_store else 1
    plan = make_plan(
        selection, group, group * head_dim * q.element_size(), queries_per_chunk, step, rows_per_item or ROWS_PER_ITEM
    )
    dq = torch.empty_like(q)
    # Only the program of a block adds to its gradients, for one set of queries after the other.
    grads = torch.zeros(2, batch_selectors, blocks * block, head_dim, dtype=torch.float32, device=q.device)
    partial_sums = torch.empty(max(plan.buffers, 1), 2, block, head_dim, dtype=torch.float32, device=q.device)
    partial_dq = torch.empty(plan.rows, head_dim, dtype=q.dtype, device=q.device)
    first_rows = torch.empty(batch_selectors, plan.queries_per_chunk, slots, dtype=torch.int32, device=q.device)
    inputs = grad_out, q, k, v, row_stats, selection, plan
    for index in range(plan.chunks):
        first_rows.fill_(-1)
        partials_of_chunk(*inputs, index, scale, config, partial_dq, first_rows, grads, partial_sums)
        combine_slots(partial_dq, None, first_rows, dq, None, index * plan.queries_per_chunk, group, scale, sums)
    # Sum over the selectors of a KV head; drop the padding after the last key.
    grads = grads.view(2, batch, kv_heads, selectors // kv_heads, blocks * block, head_dim)
    grads = grads[:, :, :, 0] if selectors == kv_heads else grads.sum(3)
    dk, dv = grads[0, :, :, :keys].mul_(scale), grads[1, :, :, :keys]
    return dq, torch.empty_like(k).copy_(dk), torch.empty_like(v).copy_(dv)


def by_query(row_stats: Tensor, queries: int) -> Tensor:
    """float32 `[batch, queries, heads, 2]`: (lse, delta), from the result of dense.backward.compute_row_stats."""
    return row_stats[..., :queries].permute(0, 3, 1, 2).contiguous()


def partials_of_chunk(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    row_stats: Tensor,
    selection: Selection,
    plan: SelectionPlan,
    index: int,
    scale: float,
    config: SelectionConfig,
    partial_dq: Tensor,
    first_rows: Tensor,
    grads: Tensor,
    partial_sums: Tensor,
) -> None:
    """Writes partial_dq and first_rows, inputs of `combine_slots`, for chunk `index` of the queries; adds to grads."""
    head_dim, block = q.shape[-1], selection.block
    selectors, batch_selectors, blocks = selection.selectors, len(first_rows), selection.offsets.shape[2] - 1
    columns = triton.next_power_of_2(head_dim)
    block_gradients[(plan.items.shape[1],)](
        q,
        k,
        v,
        grad_out,
        row_stats,
        plan.items[index],
        selection.entries,
        selection.document_start,
        describe_partials(partial_dq, config.rows, columns) if config.tma_store else partial_dq,
        first_rows,
        grads,
        partial_sums,
        *q.stride()[:3],
        *k.stride()[:3],
        *v.stride()[:3],
        *grad_out.stride()[:3],
        scale * LOG2_E,
        q.shape[2],
        k.shape[2],
        blocks,
        batch_selectors,
        selectors,
        selectors // k.shape[1],
        q.shape[1],
        index * plan.queries_per_chunk,
        plan.queries_per_chunk,
        SLOTS=selection.slots,
        GROUP=q.shape[1] // selectors,
        BLOCK=block,
        HEAD_DIM=head_dim,
        D=columns,
        M=config.rows,
        TMA_STORE=config.tma_store,
        TRANSPOSED=config.transposed,
        PRECISION="ieee" if q.dtype == torch.float32 else "tf32",
        num_warps=config.warps,
        num_stages=config.stages,
        maxnreg=config.registers,
    )
    if plan.buffers:
        lines_at_once = min(16, block)
        sum_split_lists[(batch_selectors * blocks, block // lines_at_once)](
            partial_sums,
            plan.split_lists[index],
            grads,
            batch_selectors * blocks,
            BLOCK=block,
            HEAD_DIM=head_dim,
            D=columns,
            M=lines_at_once,
            num_warps=4,
        )

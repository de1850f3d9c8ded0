"""The backward pass of attention on a Selection, by key block (see __init__.py).

The program that holds a block computes the block's dK and dV and writes partial dQ, which sum_partials.py adds up. The
kernels are in gradient_kernels.py.
"""

import torch
import triton
from torch import Tensor

from kernels.backends.triton.common import LOG2_E
from kernels.backends.triton.selection.gradient_kernels import add_cuts, block_gradients
from kernels.backends.triton.selection.launch_settings import SelectedConfig, SumConfig, choose, choose_sum
from kernels.backends.triton.selection.sum_partials import add_slots
from kernels.backends.triton.selection.work_items import (
    SelectedPlan,
    make_plan,
    rows_of_partials,
)
from kernels.layout.selection import Selection

ROWS_AN_ITEM = 4096
"""As work_items.ROWS_AN_ITEM, for the backward pass, in which an item also writes the gradients of K and V once."""


def backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rows_of: Tensor,
    selection: Selection,
    scale: float,
    config: SelectedConfig | None = None,
    sums: SumConfig | None = None,
    piece: int | None = None,
    rows_an_item: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv), like q, k, v.

    rows_of comes from `by_query`; scale > 0. The arguments after it are for benchmarks (see partial_outputs.py).
    """
    (batch, heads), head_dim = q.shape[:2], q.shape[-1]
    kv_heads, keys = k.shape[1:3]
    selectors, slots, block = selection.selectors, selection.slots, selection.block
    group, lines, blocks = heads // selectors, batch * selectors, selection.offsets.shape[2] - 1
    config = config or choose("backward", q.dtype, head_dim)
    sums = sums or choose_sum(head_dim)
    step = config.rows if config.bulk else 1
    plan = make_plan(selection, group, group * head_dim * q.element_size(), piece, step, rows_an_item or ROWS_AN_ITEM)
    dq = torch.empty_like(q)
    # A block's program is the only one to add to it, piece of queries after piece.
    grads = torch.zeros(2, lines, blocks * block, head_dim, dtype=torch.float32, device=q.device)
    chunks = torch.empty(max(plan.slots, 1), 2, block, head_dim, dtype=torch.float32, device=q.device)
    partial_dq = torch.empty(plan.rows, head_dim, dtype=q.dtype, device=q.device)
    places = torch.empty(lines, plan.piece, slots, dtype=torch.int32, device=q.device)
    given = grad_out, q, k, v, rows_of, selection, plan
    for index in range(plan.pieces):
        places.fill_(-1)
        partials_of_piece(*given, index, scale, config, partial_dq, places, grads, chunks)
        add_slots(partial_dq, None, places, dq, None, index * plan.piece, group, scale, sums)
    # Selectors of one KV head add up; keys beyond the end were padding.
    grads = grads.view(2, batch, kv_heads, selectors // kv_heads, blocks * block, head_dim)
    grads = grads[:, :, :, 0] if selectors == kv_heads else grads.sum(3)
    dk, dv = grads[0, :, :, :keys].mul_(scale), grads[1, :, :, :keys]
    return dq, torch.empty_like(k).copy_(dk), torch.empty_like(v).copy_(dv)


def by_query(rows_of: Tensor, queries: int) -> Tensor:
    """float32 `[batch, queries, heads, 2]`: (lse, delta) of each query and head, from dense.backward.prepare."""
    return rows_of[..., :queries].permute(0, 3, 1, 2).contiguous()


def partials_of_piece(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rows_of: Tensor,
    selection: Selection,
    plan: SelectedPlan,
    index: int,
    scale: float,
    config: SelectedConfig,
    partial_dq: Tensor,
    places: Tensor,
    grads: Tensor,
    chunks: Tensor,
) -> None:
    """Writes the partial dQ and `places` that `add_slots` takes for piece `index` of the queries; adds to `grads`."""
    head_dim, block = q.shape[-1], selection.block
    selectors, lines, blocks = selection.selectors, len(places), selection.offsets.shape[2] - 1
    columns = triton.next_power_of_2(head_dim)
    block_gradients[(plan.items.shape[1],)](
        q,
        k,
        v,
        grad_out,
        rows_of,
        plan.items[index],
        selection.entries,
        selection.document_start,
        rows_of_partials(partial_dq, config.rows, columns) if config.bulk else partial_dq,
        places,
        grads,
        chunks,
        *q.stride()[:3],
        *k.stride()[:3],
        *v.stride()[:3],
        *grad_out.stride()[:3],
        scale * LOG2_E,
        q.shape[2],
        k.shape[2],
        blocks,
        lines,
        selectors,
        selectors // k.shape[1],
        q.shape[1],
        index * plan.piece,
        plan.piece,
        SLOTS=selection.slots,
        GROUP=q.shape[1] // selectors,
        BLOCK=block,
        HEAD_DIM=head_dim,
        D=columns,
        M=config.rows,
        BULK=config.bulk,
        TURNED=config.turned,
        PRECISION="ieee" if q.dtype == torch.float32 else "tf32",
        num_warps=config.warps,
        num_stages=config.stages,
        maxnreg=config.registers,
    )
    if plan.slots:
        lines_at_once = min(16, block)
        add_cuts[(lines * blocks, block // lines_at_once)](
            chunks,
            plan.cuts[index],
            grads,
            lines * blocks,
            BLOCK=block,
            HEAD_DIM=head_dim,
            D=columns,
            M=lines_at_once,
            num_warps=4,
        )

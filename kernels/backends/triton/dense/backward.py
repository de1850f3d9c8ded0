"""Backward pass: dQ by rows, dK and dV by columns. Each output has one program: no atomics, and always the same bits.

    backward_queries.py   dQ
    backward_keys.py      dK and dV

Letters in the kernels: s scores, p weights, dp gradient of p, ds gradient of s; a trailing t: transposed
`[keys, queries]`, so that p and ds are ready as left operands of dV = P^T dO and dK = dS^T Q.
delta = rowsum(dO * O) - grad_lse (Dao 2023).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.backends.triton.common import addressable, positive_scale
from kernels.backends.triton.dense.backward_keys import grad_keys
from kernels.backends.triton.dense.backward_queries import grad_queries
from kernels.backends.triton.dense.tile_sizes import Config
from kernels.layout.block_layout import BlockLayout


def backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    layout: BlockLayout,
    scale: float,
    by_rows: Config | None = None,
    by_columns: Config | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv), like q, k, v; see kernels/backends/__init__.py. by_rows, by_columns: launch settings, for
    benchmarks."""
    flipped = scale < 0
    q, scale = positive_scale(q, scale)
    q, k, v, grad_out = addressable(q), addressable(k), addressable(v), addressable(grad_out)
    row_stats = compute_row_stats(grad_out, grad_lse, out, lse, layout.block)
    dq = grad_queries(grad_out, q, k, v, row_stats, layout, scale, by_rows)
    dk, dv = grad_keys(grad_out, q, k, v, row_stats, layout, scale, by_columns)
    return -dq if flipped else dq, dk, dv


def compute_row_stats(grad_out: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor, block: int) -> Tensor:
    """float32 `[batch, heads, 2, queries padded to whole blocks]`: lse / ln 2, and delta.

    lse is +inf for queries without visible keys and for padding, so that p = 0 without a mask.
    """
    batch, heads, queries, head_dim = out.shape
    padded = -(-queries // block) * block
    row_stats = torch.empty(batch, heads, 2, padded, dtype=torch.float32, device=out.device)
    rows_per_program = min(64, block)
    _compute_row_stats[(padded // rows_per_program, batch * heads)](
        grad_out,
        lse if grad_lse is None else grad_lse.contiguous(),
        out,
        lse.contiguous(),
        row_stats,
        *grad_out.stride(),
        *out.stride(),
        heads,
        queries,
        padded,
        HEAD_DIM=head_dim,
        D=triton.next_power_of_2(head_dim),
        HAS_GRAD_LSE=grad_lse is not None,
        M=rows_per_program,
        num_warps=4,
    )
    return row_stats


@triton.jit(do_not_specialize=["heads", "queries", "padded"])
def _compute_row_stats(
    grad_out,
    grad_lse,
    out,
    lse,
    row_stats,
    grad_batch,
    grad_head,
    grad_query,
    grad_column,
    out_batch,
    out_head,
    out_query,
    out_column,
    heads,
    queries,
    padded,
    HEAD_DIM: tl.constexpr,
    D: tl.constexpr,
    HAS_GRAD_LSE: tl.constexpr,
    M: tl.constexpr,
):
    query = tl.program_id(0).to(tl.int64) * M + tl.arange(0, M)
    index = tl.program_id(1).to(tl.int64)
    batch, head = index // heads, index % heads
    column = tl.arange(0, D).to(tl.int64)
    live = query < queries
    inside = live[:, None] & (column < HEAD_DIM)[None, :]
    o = tl.load(
        out + batch * out_batch + head * out_head + query[:, None] * out_query + column[None, :] * out_column,
        mask=inside,
        other=0.0,
    )
    do = tl.load(
        grad_out + batch * grad_batch + head * grad_head + query[:, None] * grad_query + column[None, :] * grad_column,
        mask=inside,
        other=0.0,
    )
    delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    if HAS_GRAD_LSE:
        delta -= tl.load(grad_lse + index * queries + query, mask=live, other=0.0)
    x = tl.load(lse + index * queries + query, mask=live, other=float("-inf"))
    seen = x != float("-inf")
    tl.store(row_stats + index * 2 * padded + query, tl.where(seen, x * 1.4426950408889634, float("inf")))
    tl.store(row_stats + (index * 2 + 1) * padded + query, tl.where(seen, delta, 0.0))

"""Attention on a Selection **by key block**: a program loads one block's K and V for all queries that chose the block.

Its rows are (query, head) pairs from the whole sequence, so the matrix products are full for every size of a GQA group.
The result of a row and one block is partial: the forward pass writes (out, log-sum-exp) for every (query, slot), the
backward pass a partial dQ, and a second kernel combines a query's slots in a fixed order. The first kernel also sums dK
and dV; long lists are split into items, whose sums are added in order. There are no atomics, so repeats give the same
bits. Partial results take slots times the memory of the output, so queries are processed in chunks (work_items.py).

Letters in the kernels: s scores, p weights, dp gradient of p, ds gradient of s; a trailing t: transposed.
"""

import torch
from torch import Tensor

from kernels.backends.triton import common
from kernels.backends.triton.common import addressable, positive_scale
from kernels.backends.triton.dense.backward import compute_row_stats
from kernels.backends.triton.selection import attention_mass, gradients, partial_outputs
from kernels.backends.triton.selection.work_items import make_plan
from kernels.layout.selection import Selection


def unsupported(device: str, dtype: torch.dtype, head_dim: int, group: int, block: int) -> str | None:
    """Why these kernels cannot serve a call, with what is accepted; None if they can.

    group: query heads per selector.
    """
    if dtype == torch.float32 and head_dim > 128 and block > 64:  # a block's keys and values fill the shared memory
        return f"block {block} in float32 with head_dim {head_dim}: must be at most 64"
    return common.unsupported(device, dtype, head_dim)


def forward(q: Tensor, k: Tensor, v: Tensor, selection: Selection, scale: float) -> tuple[Tensor, Tensor]:
    """(out, lse), lse in float32; see kernels/backends/__init__.py."""
    q, scale = positive_scale(q, scale)
    q, k, v = addressable(q), addressable(k), addressable(v)
    return partial_outputs.forward(q, k, v, selection, scale)


def backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    selection: Selection,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv), like q, k, v."""
    flipped = scale < 0
    q, scale = positive_scale(q, scale)
    q, k, v, grad_out = addressable(q), addressable(k), addressable(v), addressable(grad_out)
    row_stats = gradients.by_query(compute_row_stats(grad_out, grad_lse, out, lse, 64), q.shape[2])
    dq, dk, dv = gradients.backward(grad_out, q, k, v, row_stats, selection, scale)
    return -dq if flipped else dq, dk, dv


def block_mass(q: Tensor, k: Tensor, lse: Tensor, selection: Selection, scale: float) -> Tensor:
    """See kernels.selection.selected_attention.block_mass."""
    q, scale = positive_scale(q, scale)
    q, k = addressable(q), addressable(k)
    plan = make_plan(selection, q.shape[1] // selection.selectors, 4)
    return attention_mass.block_mass(q, k, lse, selection, plan, scale)

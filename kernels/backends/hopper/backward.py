"""Backward pass: dQ by rows, dK and dV by columns, without atomics: always the same bits.

The kernel of dQ also writes the statistics of rows, lse and delta, for the kernel of dK and dV.
"""

from torch import Tensor

from kernels.backends.hopper.backward_keys import grad_keys
from kernels.backends.hopper.backward_queries import grad_queries
from kernels.backends.triton.common import addressable, positive_scale
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
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv), like q, k, v; see kernels/backends/__init__.py."""
    flipped = scale < 0
    q, scale = positive_scale(q, scale)
    q, k, v, out, grad_out = addressable(q), addressable(k), addressable(v), addressable(out), addressable(grad_out)
    dq, row_stats = grad_queries(grad_out, grad_lse, q, k, v, out, lse, layout, scale)
    dk, dv = grad_keys(grad_out, q, k, v, row_stats, layout, scale)
    return -dq if flipped else dq, dk, dv

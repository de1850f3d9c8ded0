"""Backward pass: dQ by rows, dK and dV by columns, without atomics: always the same bits."""

from torch import Tensor

from kernels.backends.hopper.backward_keys import grad_keys
from kernels.backends.hopper.backward_queries import grad_queries
from kernels.backends.triton.dense.backward import compute_gradients
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
    return compute_gradients(grad_queries, grad_keys, grad_out, grad_lse, q, k, v, out, lse, layout, scale)

"""Tokens' keys and values to their places among the joined ones, and gradients back: one or two tensors a launch."""

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

COPIED_AT_ONCE = 32
"""Tokens that a program copies."""


def copy_tokens(parts: Sequence[Tensor], to: Sequence[Tensor], padded: int) -> None:
    """Copies `[batch, length, heads, head_dim]` to the first places of tensors of that order of dimensions, in one
    launch for one pair or two; zeros from there to place `padded`. Two targets have the same strides."""
    batch, length, heads, head_dim = parts[0].shape
    first, last = parts[0], parts[-1]
    _copy[(triton.cdiv(padded, COPIED_AT_ONCE), heads, batch * len(parts))](
        first,
        last,
        to[0],
        to[-1],
        *first.stride()[:3],
        *last.stride()[:3],
        *to[0].stride()[:3],
        length,
        padded,
        TENSORS=len(parts),
        HEAD_DIM=head_dim,
        D=triton.next_power_of_2(head_dim),
        M=COPIED_AT_ONCE,
        num_warps=4,
    )


@triton.jit(do_not_specialize=["length", "padded"])
def _copy(
    x, y, to_x, to_y, x_batch, x_step, x_head, y_batch, y_step, y_head, to_batch, to_step, to_head, length, padded,
    TENSORS: tl.constexpr, HEAD_DIM: tl.constexpr, D: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1).to(tl.int64)
    batch = (tl.program_id(2) // TENSORS).to(tl.int64)
    step = tl.program_id(0) * M + tl.arange(0, M)
    to = batch * to_batch + head * to_head
    if tl.program_id(2) % TENSORS == 0:
        _move(x + batch * x_batch + head * x_head, to_x + to, x_step, to_step, step, length, padded, HEAD_DIM, D)
    else:
        _move(y + batch * y_batch + head * y_head, to_y + to, y_step, to_step, step, length, padded, HEAD_DIM, D)


@triton.jit
def _move(x, to, x_step, to_step, step, length, padded, HEAD_DIM: tl.constexpr, D: tl.constexpr):
    column = tl.arange(0, D)[None, :]
    within = column < HEAD_DIM
    wide = step.to(tl.int64)[:, None]
    rows = tl.load(x + wide * x_step + column, (step < length)[:, None] & within, 0.0)
    tl.store(to + wide * to_step + column, rows.to(to.dtype.element_ty), (step < padded)[:, None] & within)

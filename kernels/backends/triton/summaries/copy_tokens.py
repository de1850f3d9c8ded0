"""Copies the tokens' keys and values to the joined ones, and gradients back: one or two tensors per launch."""

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

TOKENS_PER_PROGRAM = 32
"""Number of tokens that a program copies."""


def copy_tokens(sources: Sequence[Tensor], targets: Sequence[Tensor], padded: int) -> None:
    """Copies each source `[batch, length, heads, head_dim]` to the first `length` entries of its target.

    Targets have the same order of dimensions; entries from `length` to `padded` are set to 0. One or two pairs take one
    launch; two targets must have the same strides.
    """
    batch, length, heads, head_dim = sources[0].shape
    first, last = sources[0], sources[-1]
    _copy[(triton.cdiv(padded, TOKENS_PER_PROGRAM), heads, batch * len(sources))](
        first,
        last,
        targets[0],
        targets[-1],
        *first.stride()[:3],
        *last.stride()[:3],
        *targets[0].stride()[:3],
        length,
        padded,
        TENSORS=len(sources),
        HEAD_DIM=head_dim,
        D=triton.next_power_of_2(head_dim),
        M=TOKENS_PER_PROGRAM,
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

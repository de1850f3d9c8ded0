"""Rotary embedding in one kernel, for few tokens, where the launches of separate kernels dominate the time."""

import torch
import triton
import triton.language as tl
from torch import Tensor


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """As model.rope.rotate: x `[batch, length, heads, head_dim]` in one of `common.DTYPES`, computed in float32."""
    batch, length, heads, head_dim = x.shape
    x, cos, sin = (t if t.stride(-1) == 1 else t.contiguous() for t in (x, cos, sin))
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    by_batch = [0 if t.shape[0] == 1 else t.stride(0) for t in (cos, sin)]
    _rotate[(batch * length, heads)](
        x,
        cos,
        sin,
        out,
        *x.stride()[:3],
        *(step for t, first in zip((cos, sin), by_batch, strict=True) for step in (first, t.stride(1))),
        length,
        HALF=head_dim // 2,
        COLUMNS=triton.next_power_of_2(head_dim // 2),
        num_warps=1,
    )
    return out


@triton.jit(do_not_specialize=["length", "x_batch", "x_step", "cos_batch", "cos_step", "sin_batch", "sin_step"])
def _rotate(
    x,
    cos,
    sin,
    out,
    x_batch,
    x_step,
    x_head,
    cos_batch,
    cos_step,
    sin_batch,
    sin_step,
    length,
    HALF: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    batch, step, head = row // length, row % length, tl.program_id(1)
    column = tl.arange(0, COLUMNS)
    live = column < HALF
    at = x + batch * x_batch + step * x_step + head * x_head + column
    first = tl.load(at, live, 0.0).to(tl.float32)
    second = tl.load(at + HALF, live, 0.0).to(tl.float32)
    c = tl.load(cos + batch * cos_batch + step * cos_step + column, live, 0.0)
    s = tl.load(sin + batch * sin_batch + step * sin_step + column, live, 0.0)
    to = out + (row * tl.num_programs(1) + head) * 2 * HALF + column
    tl.store(to, (first * c - second * s).to(out.dtype.element_ty), live)
    tl.store(to + HALF, (second * c + first * s).to(out.dtype.element_ty), live)

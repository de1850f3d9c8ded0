"""The forward pass of summaries.py: a launch a level, from fine to coarse; a program pools one span of one KV head.

Letters as in pool_span.py; c, s the rotation's cosine and sine.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.backends.triton.summaries.pool_span import COUNTS, launch_shape, pooled_span, span_of, store_halves


def forward(
    unrotated: Tensor,
    values: Tensor,
    query: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    axes: Sequence[Tensor],
    spans: Sequence[int],
    places: Sequence[int],
    joined: tuple[Tensor, Tensor],
) -> Tensor:
    """Fills the summaries' places in `joined`; returns pooled, float32 `[2, batch, slots of all levels, kv_heads,
    head_dim]`. Arguments as of `join_summaries` (kernels/summaries); places: the first key of each level, and the
    end."""
    batch, _, kv_heads, head_dim = values.shape
    slots = [axis.shape[2] for axis in axes]
    pooled = torch.empty(2, batch, sum(slots), kv_heads, head_dim, dtype=torch.float32, device=values.device)
    fine, unit, begin = (unrotated, values), 1, 0
    for level, (axis, span) in enumerate(zip(axes, spans, strict=True)):
        ours = pooled[:, :, begin : begin + slots[level]]
        _pool[((places[level + 1] - places[level]) * kv_heads, batch)](
            *fine,
            values if query is None else query[level],
            axis,
            cos,
            sin,
            ours,
            *joined,
            *fine[0].stride()[:3],
            *fine[1].stride()[:3],
            pooled.stride(0),
            pooled.stride(1),
            *joined[0].stride()[:3],
            axis.stride(0) if axis.shape[0] > 1 else 0,
            axis.stride(1),
            cos.stride(0) if cos.shape[0] > 1 else 0,
            cos.stride(1),
            kv_heads,
            slots[level],
            places[level],
            span // 2,
            UNIT=unit,
            PIECES=span // unit,
            LEARNED=query is not None,
            **launch_shape(head_dim, span // unit),
        )
        fine, unit, begin = (ours[0], ours[1]), span, begin + slots[level]
    return pooled


@triton.jit(do_not_specialize=COUNTS)
def _pool(
    x,
    y,
    query,
    axis,
    cos,
    sin,
    pooled,
    joined_k,
    joined_v,
    x_batch,
    x_step,
    x_head,
    y_batch,
    y_step,
    y_head,
    pooled_value,
    pooled_batch,
    joined_batch,
    joined_head,
    joined_step,
    axis_batch,
    axis_row,
    angle_batch,
    angle_step,
    kv_heads,
    slots,
    place,
    middle,
    UNIT: tl.constexpr,
    PIECES: tl.constexpr,
    LEARNED: tl.constexpr,
    HALF: tl.constexpr,
    H: tl.constexpr,
    M: tl.constexpr,
):
    head = tl.program_id(0) % kv_heads
    slot = tl.program_id(0) // kv_heads
    batch = tl.program_id(1).to(tl.int64)
    half = tl.arange(0, H)
    within = half < HALF
    wide_head = head.to(tl.int64)
    to = batch * joined_batch + wide_head * joined_head + (place + slot).to(tl.int64) * joined_step + half
    nothing = tl.zeros([H], tl.float32)
    if slot >= slots:  # padding to whole blocks
        store_halves(joined_k + to, nothing, nothing, within, HALF)
        store_halves(joined_v + to, nothing, nothing, within, HALF)
        return
    whole, token = span_of(axis + batch * axis_batch + slot, axis_row)
    query_1 = nothing
    query_2 = nothing
    if LEARNED:
        query_1 = tl.load(query + head * 2 * HALF + half, within, 0.0).to(tl.float32)
        query_2 = tl.load(query + head * 2 * HALF + HALF + half, within, 0.0).to(tl.float32)
    p_1 = nothing
    p_2 = nothing
    u_1 = nothing
    u_2 = nothing
    if whole:
        p_1, p_2, u_1, u_2, _, _ = pooled_span(
            x + batch * x_batch + wide_head * x_head, y + batch * y_batch + wide_head * y_head, x_step, y_step,
            token // UNIT, query_1, query_2, half, within, PIECES, HALF, H, M, LEARNED,
        )  # fmt: skip
    at = pooled + batch * pooled_batch + (slot.to(tl.int64) * kv_heads + head) * 2 * HALF + half
    store_halves(at, p_1, p_2, within, HALF)
    store_halves(at + pooled_value, u_1, u_2, within, HALF)
    angle = batch * angle_batch + tl.where(whole, token + middle, 0).to(tl.int64) * angle_step + half
    c = tl.load(cos + angle, within, 0.0)
    s = tl.load(sin + angle, within, 0.0)
    store_halves(joined_k + to, p_1 * c - p_2 * s, p_2 * c + p_1 * s, within, HALF)
    store_halves(joined_v + to, u_1, u_2, within, HALF)

"""The forward pass: one launch per level, from fine to coarse; a program pools one span of one KV head.

Letters as in pool_span.py; c, s cosine and sine of the rotation.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.backends.triton.summaries.pool_span import (
    NOT_SPECIALIZED,
    launch_shape,
    pooled_span,
    span_of,
    store_halves,
)


def forward(
    unrotated: Tensor,
    values: Tensor,
    query: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    intervals: Sequence[Tensor],
    spans: Sequence[int],
    offsets: Sequence[int],
    joined: tuple[Tensor, Tensor],
) -> Tensor:
    """Writes the summaries to `joined`; returns pooled, float32 `[2, batch, entries of all levels, kv_heads,
    head_dim]`.

    joined: the keys and the values of all levels. offsets: the index in it of each level's first key, then the end of
    the last level. The other arguments are those of `join_summaries` (kernels/summaries).
    """
    batch, _, kv_heads, head_dim = values.shape
    entries = [interval.shape[2] for interval in intervals]
    pooled = torch.empty(2, batch, sum(entries), kv_heads, head_dim, dtype=torch.float32, device=values.device)
    fine, child_span, first_entry = (unrotated, values), 1, 0
    for level, (interval, span) in enumerate(zip(intervals, spans, strict=True)):
        ours = pooled[:, :, first_entry : first_entry + entries[level]]
        _pool[((offsets[level + 1] - offsets[level]) * kv_heads, batch)](
            *fine,
            values if query is None else query[level],
            interval,
            cos,
            sin,
            ours,
            *joined,
            *fine[0].stride()[:3],
            *fine[1].stride()[:3],
            pooled.stride(0),
            pooled.stride(1),
            *joined[0].stride()[:3],
            interval.stride(0) if interval.shape[0] > 1 else 0,
            interval.stride(1),
            cos.stride(0) if cos.shape[0] > 1 else 0,
            cos.stride(1),
            kv_heads,
            entries[level],
            offsets[level],
            span // 2,
            CHILD_SPAN=child_span,
            CHILDREN=span // child_span,
            LEARNED=query is not None,
            **launch_shape(head_dim, span // child_span),
        )
        fine, child_span, first_entry = (ours[0], ours[1]), span, first_entry + entries[level]
    return pooled


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def _pool(
    x,
    y,
    query,
    interval,
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
    interval_batch,
    interval_row,
    angle_batch,
    angle_step,
    kv_heads,
    entries,
    offset,
    middle,
    CHILD_SPAN: tl.constexpr,
    CHILDREN: tl.constexpr,
    LEARNED: tl.constexpr,
    HALF: tl.constexpr,
    H: tl.constexpr,
    M: tl.constexpr,
):
    head = tl.program_id(0) % kv_heads
    entry = tl.program_id(0) // kv_heads
    batch = tl.program_id(1).to(tl.int64)
    half = tl.arange(0, H)
    within = half < HALF
    wide_head = head.to(tl.int64)
    to = batch * joined_batch + wide_head * joined_head + (offset + entry).to(tl.int64) * joined_step + half
    nothing = tl.zeros([H], tl.float32)
    if entry >= entries:  # padding to whole blocks
        store_halves(joined_k + to, nothing, nothing, within, HALF)
        store_halves(joined_v + to, nothing, nothing, within, HALF)
        return
    has_span, token = span_of(interval + batch * interval_batch + entry, interval_row)
    query_1 = nothing
    query_2 = nothing
    if LEARNED:
        query_1 = tl.load(query + head * 2 * HALF + half, within, 0.0).to(tl.float32)
        query_2 = tl.load(query + head * 2 * HALF + HALF + half, within, 0.0).to(tl.float32)
    p_1 = nothing
    p_2 = nothing
    u_1 = nothing
    u_2 = nothing
    if has_span:
        p_1, p_2, u_1, u_2, _, _ = pooled_span(
            x + batch * x_batch + wide_head * x_head, y + batch * y_batch + wide_head * y_head, x_step, y_step,
            token // CHILD_SPAN, query_1, query_2, half, within, CHILDREN, HALF, H, M, LEARNED,
        )  # fmt: skip
    at = pooled + batch * pooled_batch + (entry.to(tl.int64) * kv_heads + head) * 2 * HALF + half
    store_halves(at, p_1, p_2, within, HALF)
    store_halves(at + pooled_value, u_1, u_2, within, HALF)
    angle = batch * angle_batch + tl.where(has_span, token + middle, 0).to(tl.int64) * angle_step + half
    c = tl.load(cos + angle, within, 0.0)
    s = tl.load(sin + angle, within, 0.0)
    store_halves(joined_k + to, p_1 * c - p_2 * s, p_2 * c + p_1 * s, within, HALF)
    store_halves(joined_v + to, u_1, u_2, within, HALF)

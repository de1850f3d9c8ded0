"""The backward pass: one launch per level, from coarse to fine; a program computes the gradients of one span's
children.

It recomputes the span's weights. A child belongs to one span per level, so one program writes each gradient. Only the
gradient of the query is a sum over programs, which are added in order afterwards.

Letters as in pool_span.py; w weight of a child; c, s cosine and sine of the rotation; r gradient of the rotated key;
the prefix g means gradient (gs: of a score).
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.backends.triton.summaries.pool_span import (
    NOT_SPECIALIZED,
    launch_shape,
    load_children,
    pooled_span,
    score_children,
    span_of,
    store_halves,
)


def backward(
    grads: tuple[Tensor, Tensor],
    unrotated: Tensor,
    values: Tensor,
    query: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    intervals: Sequence[Tensor],
    spans: Sequence[int],
    offsets: Sequence[int],
    pooled: Tensor,
    grad_values: Tensor,
) -> tuple[Tensor, Tensor | None]:
    """(gradient of unrotated, of query); adds to grad_values `[batch, length, kv_heads, head_dim]`.

    grads: the gradients of `joined`. The other arguments are those of pool_levels.forward.
    """
    batch, _, kv_heads, head_dim = values.shape
    entries = [interval.shape[2] for interval in intervals]
    grad_unrotated = torch.zeros(values.shape, dtype=unrotated.dtype, device=values.device)
    # Gradients of each level's pooled keys and values from the coarser level; 0 for children without a span.
    grad_pooled = torch.zeros_like(pooled)
    grad_query = None if query is None else torch.empty_like(query)
    for level in reversed(range(len(intervals))):
        interval, span, child_span = intervals[level], spans[level], spans[level - 1] if level else 1
        first_entry = sum(entries[:level])
        here = grad_pooled[:, :, first_entry : first_entry + entries[level]]
        if level:
            finer = slice(first_entry - entries[level - 1], first_entry)
            fine, fine_grads = pooled[:, :, finer].unbind(0), grad_pooled[:, :, finer].unbind(0)
        else:
            fine, fine_grads = (unrotated, values), (grad_unrotated, grad_values)
        shape = (batch * entries[level], kv_heads, head_dim)
        sums = torch.empty(shape, dtype=torch.float32, device=values.device) if query is not None else here
        _pool_backward[(entries[level] * kv_heads, batch)](
            *fine,
            values if query is None else query[level],
            interval,
            cos,
            sin,
            here,
            *grads,
            *fine_grads,
            sums,
            *fine[0].stride()[:3],
            *fine[1].stride()[:3],
            *fine_grads[0].stride()[:3],
            *fine_grads[1].stride()[:3],
            pooled.stride(0),
            pooled.stride(1),
            *grads[0].stride()[:3],
            *grads[1].stride()[:3],
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
            ADD=level == 0,
            **launch_shape(head_dim, span // child_span),
        )
        if grad_query is not None:
            grad_query[level] = sums.sum(0)
    return grad_unrotated, grad_query


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def _pool_backward(
    x,
    y,
    query,
    interval,
    cos,
    sin,
    from_coarser,
    grad_k,
    grad_v,
    grad_x,
    grad_y,
    sums,
    x_batch,
    x_step,
    x_head,
    y_batch,
    y_step,
    y_head,
    gx_batch,
    gx_step,
    gx_head,
    gy_batch,
    gy_step,
    gy_head,
    pooled_value,
    pooled_batch,
    gk_batch,
    gk_head,
    gk_step,
    gv_batch,
    gv_head,
    gv_step,
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
    ADD: tl.constexpr,
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
    nothing = tl.zeros([H], tl.float32)
    to_sums = sums + ((batch * entries + entry) * kv_heads + head) * 2 * HALF + half
    has_span, token = span_of(interval + batch * interval_batch + entry, interval_row)
    if has_span == 0:
        if LEARNED:
            store_halves(to_sums, nothing, nothing, within, HALF)
        return
    query_1 = nothing
    query_2 = nothing
    if LEARNED:
        query_1 = tl.load(query + head * 2 * HALF + half, within, 0.0).to(tl.float32)
        query_2 = tl.load(query + head * 2 * HALF + HALF + half, within, 0.0).to(tl.float32)
    x += batch * x_batch + wide_head * x_head
    y += batch * y_batch + wide_head * y_head
    first = token // CHILD_SPAN
    p_1, p_2, u_1, u_2, m, l = pooled_span(  # noqa: E741
        x, y, x_step, y_step, first, query_1, query_2, half, within, CHILDREN, HALF, H, M, LEARNED
    )
    angle = batch * angle_batch + (token + middle).to(tl.int64) * angle_step + half
    c = tl.load(cos + angle, within, 0.0)
    s = tl.load(sin + angle, within, 0.0)
    key = (offset + entry).to(tl.int64)
    at = grad_k + batch * gk_batch + wide_head * gk_head + key * gk_step + half
    r_1 = tl.load(at, within, 0.0).to(tl.float32)
    r_2 = tl.load(at + HALF, within, 0.0).to(tl.float32)
    at = grad_v + batch * gv_batch + wide_head * gv_head + key * gv_step + half
    gu_1 = tl.load(at, within, 0.0).to(tl.float32)
    gu_2 = tl.load(at + HALF, within, 0.0).to(tl.float32)
    at = from_coarser + batch * pooled_batch + (entry.to(tl.int64) * kv_heads + head) * 2 * HALF + half
    gp_1 = r_1 * c + r_2 * s + tl.load(at, within, 0.0)
    gp_2 = r_2 * c - r_1 * s + tl.load(at + HALF, within, 0.0)
    gu_1 += tl.load(at + pooled_value, within, 0.0)
    gu_2 += tl.load(at + pooled_value + HALF, within, 0.0)
    mean = tl.sum(gp_1 * p_1 + gp_2 * p_2 + gu_1 * u_1 + gu_2 * u_2, 0)  # the weighted mean of the weights' gradients
    sum_1 = nothing
    sum_2 = nothing
    grad_x += batch * gx_batch + wide_head * gx_head
    grad_y += batch * gy_batch + wide_head * gy_head
    for start in tl.range(0, CHILDREN, M):
        child = start + tl.arange(0, M)
        valid = child < CHILDREN
        x_1, x_2 = load_children(x, first + child, x_step, half, valid, within, HALF)
        w = tl.exp(score_children(x_1, x_2, query_1, query_2, valid, LEARNED) - m) / l
        gx_1 = w[:, None] * gp_1[None, :]
        gx_2 = w[:, None] * gp_2[None, :]
        gy_1 = w[:, None] * gu_1[None, :]
        gy_2 = w[:, None] * gu_2[None, :]
        if LEARNED:
            y_1, y_2 = load_children(y, first + child, y_step, half, valid, within, HALF)
            gw = tl.sum(gp_1[None, :] * x_1 + gp_2[None, :] * x_2 + gu_1[None, :] * y_1 + gu_2[None, :] * y_2, 1)
            gs = w * (gw - mean)
            gx_1 += gs[:, None] * query_1[None, :]
            gx_2 += gs[:, None] * query_2[None, :]
            sum_1 += tl.sum(gs[:, None] * x_1, 0)
            sum_2 += tl.sum(gs[:, None] * x_2, 0)
        mask = valid[:, None] & within[None, :]
        wide = (first + child).to(tl.int64)[:, None]
        to = grad_x + wide * gx_step + half[None, :]
        tl.store(to, gx_1.to(to.dtype.element_ty), mask)
        tl.store(to + HALF, gx_2.to(to.dtype.element_ty), mask)
        to = grad_y + wide * gy_step + half[None, :]
        if ADD:
            gy_1 += tl.load(to, mask, 0.0).to(tl.float32)
            gy_2 += tl.load(to + HALF, mask, 0.0).to(tl.float32)
        tl.store(to, gy_1.to(to.dtype.element_ty), mask)
        tl.store(to + HALF, gy_2.to(to.dtype.element_ty), mask)
    if LEARNED:
        store_halves(to_sums, sum_1, sum_2, within, HALF)

"""Summaries of spans straight into the joined keys and values: a program pools the pieces of one span and KV head.

A level is a launch, from fine to coarse: it reads the tokens, or the finer level's pooled keys and values (float32,
before the rotation), and writes its own, and the rotated key and the value where attention reads them. The backward
pass goes from coarse to fine and computes the weights again. A span's pieces belong to no other span of its level, so
every gradient is written by one program alone; only the query's is a sum over programs, added up in order afterwards.

Letters: x, y a piece's key and value; p, u the pooled ones; w weights; g gradients. Keys are held in two halves, as the
rotation pairs them.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

AT_ONCE, WARPS = 16, 2
"""Pieces that a program looks at in one step, and its warps."""

COPIED_AT_ONCE = 32
"""Tokens that a program copies."""


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
    head_dim]`. Arguments as of kernels.summaries.join_summaries; places: the first key of each level, and the end."""
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
            **_shape(head_dim, span // unit),
        )
        fine, unit, begin = (ours[0], ours[1]), span, begin + slots[level]
    return pooled


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


def backward(
    grads: tuple[Tensor, Tensor],
    unrotated: Tensor,
    values: Tensor,
    query: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    axes: Sequence[Tensor],
    spans: Sequence[int],
    places: Sequence[int],
    pooled: Tensor,
    grad_values: Tensor,
) -> tuple[Tensor, Tensor | None]:
    """(gradient of unrotated, of query); adds to grad_values `[batch, length, kv_heads, head_dim]`.

    grads: those of `joined`.
    """
    batch, _, kv_heads, head_dim = values.shape
    slots = [axis.shape[2] for axis in axes]
    grad_unrotated = torch.zeros(values.shape, dtype=unrotated.dtype, device=values.device)
    # What a level's pooled keys and values get from the coarser one; a piece of no span gets nothing.
    grad_pooled = torch.zeros_like(pooled)
    grad_query = None if query is None else torch.empty_like(query)
    for level in reversed(range(len(axes))):
        axis, span, unit = axes[level], spans[level], spans[level - 1] if level else 1
        begin = sum(slots[:level])
        here = grad_pooled[:, :, begin : begin + slots[level]]
        if level:
            finer = slice(begin - slots[level - 1], begin)
            fine, fine_grads = pooled[:, :, finer].unbind(0), grad_pooled[:, :, finer].unbind(0)
        else:
            fine, fine_grads = (unrotated, values), (grad_unrotated, grad_values)
        shape = (batch * slots[level], kv_heads, head_dim)
        sums = torch.empty(shape, dtype=torch.float32, device=values.device) if query is not None else here
        _pool_backward[(slots[level] * kv_heads, batch)](
            *fine,
            values if query is None else query[level],
            axis,
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
            ADD=level == 0,
            **_shape(head_dim, span // unit),
        )
        if grad_query is not None:
            grad_query[level] = sums.sum(0)
    return grad_unrotated, grad_query


def _shape(head_dim: int, pieces: int) -> dict[str, int]:
    half = head_dim // 2
    at_once = min(AT_ONCE, triton.next_power_of_2(pieces))
    return dict(HALF=half, H=triton.next_power_of_2(half), M=at_once, num_warps=WARPS)


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


COUNTS = ["kv_heads", "slots", "place", "middle"]


@triton.jit
def _pieces(x, at, step, half, there, within, HALF: tl.constexpr):
    """Both halves of pieces `at`, in float32."""
    pointer = x + at.to(tl.int64)[:, None] * step + half[None, :]
    mask = there[:, None] & within[None, :]
    return tl.load(pointer, mask, 0.0).to(tl.float32), tl.load(pointer + HALF, mask, 0.0).to(tl.float32)


@triton.jit
def _weigh(x_1, x_2, query_1, query_2, there, LEARNED: tl.constexpr):
    """The pieces' scores; those that are not there have -inf."""
    scores = tl.sum(x_1 * query_1[None, :] + x_2 * query_2[None, :], 1) if LEARNED else tl.zeros_like(tl.sum(x_1, 1))
    return tl.where(there, scores, float("-inf"))


@triton.jit
def _pooled(
    x, y, x_step, y_step, first, query_1, query_2, half, within, PIECES: tl.constexpr, HALF: tl.constexpr,
    H: tl.constexpr, M: tl.constexpr, LEARNED: tl.constexpr,
):  # fmt: skip
    """(pooled key, pooled value in halves, highest score, sum of exp(score - highest)) of a span."""
    m = float("-inf")
    l = 0.0  # noqa: E741
    p_1 = tl.zeros([H], tl.float32)
    p_2 = p_1
    u_1 = p_1
    u_2 = p_1
    for start in tl.range(0, PIECES, M):
        piece = start + tl.arange(0, M)
        there = piece < PIECES
        x_1, x_2 = _pieces(x, first + piece, x_step, half, there, within, HALF)
        y_1, y_2 = _pieces(y, first + piece, y_step, half, there, within, HALF)
        s = _weigh(x_1, x_2, query_1, query_2, there, LEARNED)
        highest = tl.maximum(m, tl.max(s, 0))
        e = tl.exp(s - highest)
        kept = tl.exp(m - highest)
        m = highest
        l = l * kept + tl.sum(e, 0)  # noqa: E741
        p_1 = p_1 * kept + tl.sum(e[:, None] * x_1, 0)
        p_2 = p_2 * kept + tl.sum(e[:, None] * x_2, 0)
        u_1 = u_1 * kept + tl.sum(e[:, None] * y_1, 0)
        u_2 = u_2 * kept + tl.sum(e[:, None] * y_2, 0)
    return p_1 / l, p_2 / l, u_1 / l, u_2 / l, m, l


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
        _store(joined_k + to, nothing, nothing, within, HALF)
        _store(joined_v + to, nothing, nothing, within, HALF)
        return
    whole, token = _span(axis + batch * axis_batch + slot, axis_row)
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
        p_1, p_2, u_1, u_2, _, _ = _pooled(
            x + batch * x_batch + wide_head * x_head, y + batch * y_batch + wide_head * y_head, x_step, y_step,
            token // UNIT, query_1, query_2, half, within, PIECES, HALF, H, M, LEARNED,
        )  # fmt: skip
    at = pooled + batch * pooled_batch + (slot.to(tl.int64) * kv_heads + head) * 2 * HALF + half
    _store(at, p_1, p_2, within, HALF)
    _store(at + pooled_value, u_1, u_2, within, HALF)
    angle = batch * angle_batch + tl.where(whole, token + middle, 0).to(tl.int64) * angle_step + half
    c = tl.load(cos + angle, within, 0.0)
    s = tl.load(sin + angle, within, 0.0)
    _store(joined_k + to, p_1 * c - p_2 * s, p_2 * c + p_1 * s, within, HALF)
    _store(joined_v + to, u_1, u_2, within, HALF)


@triton.jit
def _span(axis, row):
    """(whether a span begins in the slot, its first token's index in the sequence); axis: start, end, origin."""
    start = tl.load(axis)
    return tl.load(axis + row) > start, tl.load(axis + 2 * row) + start


@triton.jit
def _store(pointer, first, second, within, HALF: tl.constexpr):
    tl.store(pointer, first.to(pointer.dtype.element_ty), within)
    tl.store(pointer + HALF, second.to(pointer.dtype.element_ty), within)


@triton.jit(do_not_specialize=COUNTS)
def _pool_backward(
    x,
    y,
    query,
    axis,
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
    ADD: tl.constexpr,
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
    nothing = tl.zeros([H], tl.float32)
    to_sums = sums + ((batch * slots + slot) * kv_heads + head) * 2 * HALF + half
    whole, token = _span(axis + batch * axis_batch + slot, axis_row)
    if whole == 0:
        if LEARNED:
            _store(to_sums, nothing, nothing, within, HALF)
        return
    query_1 = nothing
    query_2 = nothing
    if LEARNED:
        query_1 = tl.load(query + head * 2 * HALF + half, within, 0.0).to(tl.float32)
        query_2 = tl.load(query + head * 2 * HALF + HALF + half, within, 0.0).to(tl.float32)
    x += batch * x_batch + wide_head * x_head
    y += batch * y_batch + wide_head * y_head
    first = token // UNIT
    p_1, p_2, u_1, u_2, m, l = _pooled(  # noqa: E741
        x, y, x_step, y_step, first, query_1, query_2, half, within, PIECES, HALF, H, M, LEARNED
    )
    angle = batch * angle_batch + (token + middle).to(tl.int64) * angle_step + half
    c = tl.load(cos + angle, within, 0.0)
    s = tl.load(sin + angle, within, 0.0)
    key = (place + slot).to(tl.int64)
    at = grad_k + batch * gk_batch + wide_head * gk_head + key * gk_step + half
    r_1 = tl.load(at, within, 0.0).to(tl.float32)
    r_2 = tl.load(at + HALF, within, 0.0).to(tl.float32)
    at = grad_v + batch * gv_batch + wide_head * gv_head + key * gv_step + half
    gu_1 = tl.load(at, within, 0.0).to(tl.float32)
    gu_2 = tl.load(at + HALF, within, 0.0).to(tl.float32)
    at = from_coarser + batch * pooled_batch + (slot.to(tl.int64) * kv_heads + head) * 2 * HALF + half
    gp_1 = r_1 * c + r_2 * s + tl.load(at, within, 0.0)
    gp_2 = r_2 * c - r_1 * s + tl.load(at + HALF, within, 0.0)
    gu_1 += tl.load(at + pooled_value, within, 0.0)
    gu_2 += tl.load(at + pooled_value + HALF, within, 0.0)
    mean = tl.sum(gp_1 * p_1 + gp_2 * p_2 + gu_1 * u_1 + gu_2 * u_2, 0)  # of the weights' gradients, by weight
    sum_1 = nothing
    sum_2 = nothing
    grad_x += batch * gx_batch + wide_head * gx_head
    grad_y += batch * gy_batch + wide_head * gy_head
    for begin in tl.range(0, PIECES, M):
        piece = begin + tl.arange(0, M)
        there = piece < PIECES
        x_1, x_2 = _pieces(x, first + piece, x_step, half, there, within, HALF)
        w = tl.exp(_weigh(x_1, x_2, query_1, query_2, there, LEARNED) - m) / l
        gx_1 = w[:, None] * gp_1[None, :]
        gx_2 = w[:, None] * gp_2[None, :]
        gy_1 = w[:, None] * gu_1[None, :]
        gy_2 = w[:, None] * gu_2[None, :]
        if LEARNED:
            y_1, y_2 = _pieces(y, first + piece, y_step, half, there, within, HALF)
            gw = tl.sum(gp_1[None, :] * x_1 + gp_2[None, :] * x_2 + gu_1[None, :] * y_1 + gu_2[None, :] * y_2, 1)
            gs = w * (gw - mean)
            gx_1 += gs[:, None] * query_1[None, :]
            gx_2 += gs[:, None] * query_2[None, :]
            sum_1 += tl.sum(gs[:, None] * x_1, 0)
            sum_2 += tl.sum(gs[:, None] * x_2, 0)
        mask = there[:, None] & within[None, :]
        wide = (first + piece).to(tl.int64)[:, None]
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
        _store(to_sums, sum_1, sum_2, within, HALF)

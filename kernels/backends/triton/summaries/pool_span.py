"""One span's pool, as the forward and the backward pass of summaries.py both compute it, and how its program is shaped.

Letters: x, y a piece's key and value; p, u the pooled ones; m, l the running maximum and sum of a softmax over the
span's pieces. Keys are held in two halves, as the rotation pairs them.
"""

import triton
import triton.language as tl

AT_ONCE, WARPS = 16, 2
"""Pieces that a program looks at in one step, and its warps."""

COUNTS = ["kv_heads", "slots", "place", "middle"]
"""Arguments of the kernels that differ from level to level: no reason to compile anew."""


def launch_shape(head_dim: int, pieces: int) -> dict[str, int]:
    """The compile-time sizes of a program, and its warps, for spans of `pieces` pieces."""
    half = head_dim // 2
    at_once = min(AT_ONCE, triton.next_power_of_2(pieces))
    return dict(HALF=half, H=triton.next_power_of_2(half), M=at_once, num_warps=WARPS)


@triton.jit
def span_of(axis, row):
    """(whether a span begins in the slot, its first token's index in the sequence); axis: start, end, origin."""
    start = tl.load(axis)
    return tl.load(axis + row) > start, tl.load(axis + 2 * row) + start


@triton.jit
def pieces_at(x, at, step, half, there, within, HALF: tl.constexpr):
    """Both halves of pieces `at`, in float32."""
    pointer = x + at.to(tl.int64)[:, None] * step + half[None, :]
    mask = there[:, None] & within[None, :]
    return tl.load(pointer, mask, 0.0).to(tl.float32), tl.load(pointer + HALF, mask, 0.0).to(tl.float32)


@triton.jit
def weigh(x_1, x_2, query_1, query_2, there, LEARNED: tl.constexpr):
    """The pieces' scores; those that are not there have -inf."""
    scores = tl.sum(x_1 * query_1[None, :] + x_2 * query_2[None, :], 1) if LEARNED else tl.zeros_like(tl.sum(x_1, 1))
    return tl.where(there, scores, float("-inf"))


@triton.jit
def pooled_span(
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
        x_1, x_2 = pieces_at(x, first + piece, x_step, half, there, within, HALF)
        y_1, y_2 = pieces_at(y, first + piece, y_step, half, there, within, HALF)
        s = weigh(x_1, x_2, query_1, query_2, there, LEARNED)
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


@triton.jit
def store_halves(pointer, first, second, within, HALF: tl.constexpr):
    tl.store(pointer, first.to(pointer.dtype.element_ty), within)
    tl.store(pointer + HALF, second.to(pointer.dtype.element_ty), within)

"""The pool of one span, which the forward and the backward pass compute, and the launch settings of its program.

Letters: x, y key and value of a child; p, u pooled key and value; m, l running maximum and sum of the softmax over the
span's children. Keys and values are held in two halves (suffixes _1 and _2), because the rotation pairs element i of
one half with element i of the other.
"""

import triton
import triton.language as tl

CHILDREN_PER_STEP, WARPS = 16, 2
"""The number of children that a program reads per step, and its warps."""

NOT_SPECIALIZED = ["kv_heads", "entries", "offset", "middle"]
"""Arguments that differ between levels; the kernels are not compiled again for each value."""


def launch_shape(head_dim: int, children: int) -> dict[str, int]:
    """The compile-time sizes and the warps of a program, for spans with this number of children."""
    half = head_dim // 2
    per_step = min(CHILDREN_PER_STEP, triton.next_power_of_2(children))
    return dict(HALF=half, H=triton.next_power_of_2(half), M=per_step, num_warps=WARPS)


@triton.jit
def span_of(interval, row):
    """(whether an entry has a span, the sequence index of its first token), from the entry's start, end and origin."""
    start = tl.load(interval)
    return tl.load(interval + row) > start, tl.load(interval + 2 * row) + start


@triton.jit
def load_children(x, at, step, half, valid, within, HALF: tl.constexpr):
    """Both halves of the children `at`, in float32."""
    pointer = x + at.to(tl.int64)[:, None] * step + half[None, :]
    mask = valid[:, None] & within[None, :]
    return tl.load(pointer, mask, 0.0).to(tl.float32), tl.load(pointer + HALF, mask, 0.0).to(tl.float32)


@triton.jit
def score_children(x_1, x_2, query_1, query_2, valid, LEARNED: tl.constexpr):
    """The scores of the children; -inf after the last child."""
    scores = tl.sum(x_1 * query_1[None, :] + x_2 * query_2[None, :], 1) if LEARNED else tl.zeros_like(tl.sum(x_1, 1))
    return tl.where(valid, scores, float("-inf"))


@triton.jit
def pooled_span(
    x, y, x_step, y_step, first, query_1, query_2, half, within, CHILDREN: tl.constexpr, HALF: tl.constexpr,
    H: tl.constexpr, M: tl.constexpr, LEARNED: tl.constexpr,
):  # fmt: skip
    """(pooled key, pooled value in halves, highest score, sum of exp(score - highest)) of a span."""
    m = float("-inf")
    l = 0.0  # noqa: E741
    p_1 = tl.zeros([H], tl.float32)
    p_2 = p_1
    u_1 = p_1
    u_2 = p_1
    for start in tl.range(0, CHILDREN, M):
        child = start + tl.arange(0, M)
        valid = child < CHILDREN
        x_1, x_2 = load_children(x, first + child, x_step, half, valid, within, HALF)
        y_1, y_2 = load_children(y, first + child, y_step, half, valid, within, HALF)
        s = score_children(x_1, x_2, query_1, query_2, valid, LEARNED)
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

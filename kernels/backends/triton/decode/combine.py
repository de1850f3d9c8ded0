"""Merges the results of the programs of split_keys.py into one softmax, always in the order of the splits.

Letters: m running maximum (of log2(e) * the splits' log-sum-exps), l running sum.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.backends.triton.common import LN_2

SPLITS_PER_STEP = 32
"""Number of splits that a program reads per step."""


def combine(partial_out: Tensor, partial_lse: Tensor, sink_logits: Tensor | None, q: Tensor) -> tuple[Tensor, Tensor]:
    """(out like q, lse float32 `[batch, heads, queries]`), with the sinks in the softmax.

    q `[batch, heads, queries, head_dim]`; partial_out float32 `[rows, splits, head_dim]` and partial_lse `[rows,
    splits]`, base 2. A row is one (sequence, query head, query). An empty split has lse -inf and any output.
    """
    batch, heads, queries, head_dim = q.shape
    rows, splits = partial_lse.shape
    out = torch.empty_like(q)
    lse = torch.empty(batch, heads, queries, dtype=torch.float32, device=q.device)
    _combine[(rows,)](
        partial_out,
        partial_lse,
        sink_logits,
        out,
        lse,
        *out.stride()[:3],
        heads,
        queries,
        splits,
        HEAD_DIM=head_dim,
        D=triton.next_power_of_2(head_dim),
        S=min(SPLITS_PER_STEP, triton.next_power_of_2(splits)),
        num_warps=4,
    )
    return out, lse


@triton.jit(do_not_specialize=["heads", "queries", "splits"])
def _combine(
    partial_out,
    partial_lse,
    sink_logits,
    out,
    lse,
    out_batch,
    out_head,
    out_step,
    heads,
    queries,
    splits,
    HEAD_DIM: tl.constexpr,
    D: tl.constexpr,
    S: tl.constexpr,
):
    """Merges all splits of one row (a sequence, query head and query)."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, D)
    in_column = column < HEAD_DIM
    m = float("-inf")
    l = 0.0  # noqa: E741
    acc = tl.zeros([D], tl.float32)
    for at in tl.range(0, splits, S):
        split = at + tl.arange(0, S)
        x = tl.load(partial_lse + row * splits + split, split < splits, float("-inf"))
        highest = tl.maximum(m, tl.max(x, 0))
        finite = tl.where(highest == float("-inf"), 0.0, highest)
        weight = tl.exp2(x - finite)
        alpha = tl.exp2(m - finite)
        taken = (x > float("-inf"))[:, None] & in_column[None, :]  # the output of an empty split is not written
        values = tl.load(partial_out + (row * splits + split)[:, None] * HEAD_DIM + column[None, :], taken, 0.0)
        acc = acc * alpha + tl.sum(weight[:, None] * values, 0)
        l = l * alpha + tl.sum(weight, 0)  # noqa: E741
        m = highest
    head = row // queries % heads
    if sink_logits is not None:
        sink = tl.load(sink_logits + head).to(tl.float32) * 1.4426950408889634
        highest = tl.maximum(m, sink)
        alpha = tl.exp2(m - highest)
        acc = acc * alpha
        l = l * alpha + tl.exp2(sink - highest)  # noqa: E741
        m = highest
    some = l != 0  # True for NaN, too
    total = tl.where(some, l, 1.0)
    to = out + row // (queries * heads) * out_batch + head * out_head + row % queries * out_step
    tl.store(to + column, (acc / total).to(out.dtype.element_ty), in_column)
    tl.store(lse + row, tl.where(some, (m + tl.log2(total)) * LN_2, float("-inf")))

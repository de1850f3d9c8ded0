"""Cross-entropy and its gradient in one kernel, with one program per token.

A row of logits is read twice, for the sum of exponentials and for the gradient; the second read comes from the cache
(50,304 logits in bf16 take 100 kB).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


def cross_entropy_(logits: Tensor, targets: Tensor, z_loss: float, gradient: bool) -> tuple[Tensor, Tensor]:
    """As kernels.cross_entropy.cross_entropy_: (per_token, penalty), float32 `[tokens]`; with `gradient`, overwrites
    `logits` with their gradient."""
    tokens, vocabulary = logits.shape
    per_token, penalty = (torch.empty(tokens, dtype=torch.float32, device=logits.device) for _ in range(2))
    columns = min(4096, triton.next_power_of_2(vocabulary))
    if tokens:
        _cross_entropy[(tokens,)](
            logits, targets, per_token, penalty, vocabulary, z_loss, GRADIENT=gradient, COLUMNS=columns, num_warps=8
        )
    return per_token, penalty


@triton.jit(do_not_specialize=["z_loss"])
def _cross_entropy(
    logits, targets, per_token, penalty, vocabulary, z_loss, GRADIENT: tl.constexpr, COLUMNS: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets + row)
    logits += row * vocabulary
    column = tl.arange(0, COLUMNS)
    if target < 0:
        tl.store(per_token + row, 0.0)
        tl.store(penalty + row, 0.0)
        if GRADIENT:
            for first in range(0, vocabulary, COLUMNS):
                zero = tl.zeros([COLUMNS], logits.dtype.element_ty)
                tl.store(logits + first + column, zero, first + column < vocabulary)
    else:
        # Each lane keeps its own maximum and sum, in base 2; they are joined once at the end.
        maximum = tl.full([COLUMNS], float("-inf"), tl.float32)
        total = tl.zeros([COLUMNS], tl.float32)
        for first in range(0, vocabulary, COLUMNS):
            inside = first + column < vocabulary
            scores = tl.load(logits + first + column, inside, float("-inf")).to(tl.float32) * LOG2_E
            larger = tl.maximum(maximum, scores)
            total = tl.where(inside, total * tl.exp2(maximum - larger) + tl.exp2(scores - larger), total)
            maximum = tl.where(inside, larger, maximum)
        top = tl.max(maximum)
        lse = top + tl.log2(tl.sum(total * tl.exp2(maximum - top)))
        own = tl.load(logits + target).to(tl.float32)
        nats = lse * LN_2
        tl.store(per_token + row, nats - own)
        tl.store(penalty + row, z_loss * nats * nats)
        if GRADIENT:
            scale = 1 + 2 * z_loss * nats
            for first in range(0, vocabulary, COLUMNS):
                inside = first + column < vocabulary
                scores = tl.load(logits + first + column, inside, float("-inf")).to(tl.float32) * LOG2_E
                grad = tl.exp2(scores - lse) * scale - tl.where(first + column == target, 1.0, 0.0)
                tl.store(logits + first + column, grad.to(logits.dtype.element_ty), inside)

"""FlexAttention on the kernels of FlashAttention-4 (flash-attn-4), for GPUs of compute capability 9.0 and 10.0.

It has no gradient through the log-sum-exp, so it supports neither sinks nor merged attention. It sums gradients with
atomics, so they differ in the last bits from run to run, and `auto` never chooses it.
"""

from torch import Tensor

from kernels.backends import flash, flex
from kernels.layout.block_layout import BlockLayout
from kernels.patterns import BlockSparse


def unsupported(q: Tensor, k: Tensor, v: Tensor, layout: BlockLayout) -> str | None:
    """Why this backend cannot serve the call, with what is accepted; None if it can."""
    reason = flash.missing(q) or flex.unsupported(q, k, v, layout)
    if reason is None and any(isinstance(p, BlockSparse) and p.random_blocks for p in layout.source.patterns):
        return (
            "pattern BlockSparse with random_blocks, whose hash its compiler cannot translate: must be another pattern"
        )
    return reason


def attention(
    q: Tensor, k: Tensor, v: Tensor, layout: BlockLayout, scale: float, with_lse: bool
) -> tuple[Tensor, Tensor | None]:
    """(out, None), as `kernels.attention()` describes it, differentiable. ValueError `with_lse`."""
    if with_lse:
        raise ValueError(
            "backend='flex_flash' gives no log-sum-exp to be differentiated: sink_logits and return_lse need one of "
            "auto, triton, flex, reference, blocked"
        )
    return flex.attention(q, k, v, layout, scale, with_lse, kernels="FLASH")

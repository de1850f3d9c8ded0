"""FlexAttention on the kernels of FlashAttention-4 (flash-attn-4), for GPUs of compute capability 9.0 and 10.0.

Its gradients are summed with atomics: they differ in their last bits from run to run, so `auto` never picks it.
"""

from torch import Tensor

from kernels.backends import flash, flex
from kernels.layout import BlockLayout


def unsupported(q: Tensor, k: Tensor, v: Tensor, layout: BlockLayout) -> str | None:
    """Why this cannot serve the call, naming what is possible; None where it can."""
    reason = flash.missing(q) or flex.unsupported(q, k, v, layout)
    if reason is None and layout.block != 128:
        return f"block {layout.block}: must be 128"
    return reason


def attention(q: Tensor, k: Tensor, v: Tensor, layout: BlockLayout, scale: float) -> tuple[Tensor, Tensor]:
    """(out, lse), as `kernels.attention()` describes them, differentiable."""
    return flex.attention(q, k, v, layout, scale, kernels="FLASH")

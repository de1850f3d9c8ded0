"""Attention under a mask over the tokens: one call of kernels.attention with one tile layout."""

from collections.abc import Sequence

from torch import Tensor

from kernels import Axis, BlockLayout, attention, build_layout
from kernels.patterns import Pattern
from model.attention.base import AttentionCore, Inputs


class MaskedAttention(AttentionCore):
    """The only family that also accepts one pattern per KV head."""

    @classmethod
    def build_layout(
        cls, pattern: Pattern | Sequence[Pattern], tokens: Axis, block: int, fixed: bool = False
    ) -> BlockLayout:
        return build_layout(pattern, tokens, block=block, fixed=fixed)

    def forward(self, inputs: Inputs, layout: BlockLayout) -> tuple[Tensor, Tensor | None]:
        tensors = inputs.q_BHTD, inputs.k_BKTD, inputs.v_BKTD
        if self.wants_lse:
            return attention(*tensors, layout, return_lse=True, backend=self.backend)
        return attention(*tensors, layout, backend=self.backend), None

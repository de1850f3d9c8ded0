"""Hierarchical attention: one call, and thus one softmax, over tokens and summaries."""

from kernels import Axis, attention
from kernels.patterns import Hierarchical
from kernels.summaries.hierarchy import Hierarchy, build_hierarchy
from model.attention.base import AttentionCore, AttentionOutput, Inputs, unused
from model.attention.hierarchical.pooling import SummaryPool
from model.config import ModelConfig


class HierarchicalAttention(AttentionCore):
    wants_unrotated_keys = True

    def __init__(
        self, pattern: Hierarchical, config: ModelConfig, backend: str, training_settings: None = None
    ) -> None:
        super().__init__(pattern, config, backend)
        self.pool = SummaryPool(pattern.spans, pattern.pooling, config)

    @classmethod
    def build_layout(cls, pattern: Hierarchical, tokens: Axis, block: int, fixed: bool = False) -> Hierarchy:
        return build_hierarchy(pattern, tokens, block, fixed=fixed)

    def forward(self, inputs: Inputs, layout: Hierarchy) -> AttentionOutput:
        k_BTKD, v_BTKD = inputs.k_BKTD.transpose(1, 2), inputs.v_BKTD.transpose(1, 2)
        given = k_BTKD, inputs.unrotated_k_BTKD, v_BTKD, inputs.rotation
        keys, values = self.pool.join(layout, *given, self.backend)
        out, lse = attention(inputs.q_BHTD, keys, values, layout.layout, return_lse=True, backend=self.backend)
        return AttentionOutput(out, lse, unused(self.pool) if self.training and not layout.levels[1:] else None)

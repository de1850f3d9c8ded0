"""Native sparse attention (NSA): branches over the window, the chosen blocks, and summaries of all past spans."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kernels import Axis, attention, build_layout, merge
from kernels.layout.block_layout import any_overflow
from kernels.layout.cost import AttentionCost
from kernels.patterns import NativeSparse
from kernels.patterns.hierarchical import Summaries
from kernels.summaries.hierarchy import Hierarchy, build_hierarchy
from model.attention.base import AttentionOutput, Inputs, unused
from model.attention.hierarchical.pooling import SummaryPool
from model.attention.routed.core import Branch, RoutedAttention, RoutedLayout
from model.attention.routed.indexer import IndexerTraining
from model.config import ModelConfig


@dataclass(frozen=True, eq=False)
class NativeSparseLayout(RoutedLayout):
    """RoutedLayout with the layout of the summaries; None if the sequence is shorter than a span."""

    summaries: Hierarchy | None = None

    @property
    def overflow(self) -> Tensor | None:
        return any_overflow([self.window] if self.summaries is None else [self.window, self.summaries])

    def cost(self, batch: int, heads: int, head_dim: int, selectors: int | None = None) -> AttentionCost:
        routed = super().cost(batch, heads, head_dim, selectors)
        if self.summaries is None:
            return routed
        coarse = self.summaries.cost(batch, heads, head_dim)
        return AttentionCost(
            routed.visible_pairs + coarse.visible_pairs,
            routed.tile_pairs + coarse.tile_pairs,
            routed.causal_pairs,
            routed.flops + coarse.flops,
        )

    def parts(self) -> dict[str, int]:
        return super().parts() | (self.summaries.parts() if self.summaries else {})

    def token_masks(self) -> list[tuple[Tensor, float]]:
        coarse = self.summaries.token_masks() if self.summaries else []
        return [*super().token_masks(), *((mask, 0.1) for mask, _ in coarse)]


class NativeSparseAttention(RoutedAttention):
    wants_unrotated_keys = True

    def __init__(
        self, pattern: NativeSparse, config: ModelConfig, backend: str, training_settings: IndexerTraining | None = None
    ) -> None:
        super().__init__(pattern, config, backend, training_settings)
        assert not self.indexer_alone, "its branches cannot attend densely (configs.group_checks.check_indexers)"
        self.pool = SummaryPool([pattern.summary_span], pattern.pooling, config)
        self.gates = nn.Linear(config.width, 3 * config.heads, bias=False) if pattern.combine == "gates" else None

    @classmethod
    def build_layout(cls, pattern: NativeSparse, tokens: Axis, block: int, fixed: bool = False) -> NativeSparseLayout:
        window = build_layout(pattern.local, tokens, block=block, fixed=fixed)
        fits = pattern.summary_span <= tokens.length
        summaries = build_hierarchy([Summaries(pattern.summary_span)], tokens, block, fixed=fixed) if fits else None
        return NativeSparseLayout(pattern, window, tokens.origin, summaries=summaries)

    def forward(
        self,
        inputs: Inputs,
        layout: NativeSparseLayout,
        summaries: Tensor | None = None,
        pooled: tuple[Tensor, Tensor] | None = None,
    ) -> AttentionOutput:
        """summaries: as RoutedAttention.forward takes them. pooled: keys and values `[batch, kv_heads, keys, head_dim]`
        of all spans, for `layout.summaries.layout`; None: they are computed from the inputs."""
        window, routed, routing = self.window_and_routed(inputs, layout, summaries)
        parts = [window, routed]
        if layout.summaries is not None:
            if pooled is None:
                v_BTKD = inputs.v_BKTD.transpose(1, 2)
                given = None, inputs.unrotated_k_BTKD, v_BTKD, inputs.rotation
                pooled = self.pool.join(layout.summaries, *given, self.backend)
            keys, values = pooled
            arguments = (inputs.q_BHTD, keys, values, layout.summaries.layout)
            parts.append(attention(*arguments, return_lse=True, backend=self.backend))
        out, lse = self.combine(parts, inputs.x_BTW)
        # An indexer learns the attention that the blocks receive: with gates, that of their own softmax.
        received = lse if self.gates is None else routed[1]
        own, diagnostics = self.finish(inputs, received, *routing)
        losses = [own]
        if layout.summaries is None and self.training:
            losses.append(unused(self.pool))
        losses = [loss for loss in losses if loss is not None]
        return AttentionOutput(out, lse, sum(losses) if losses else None, diagnostics)

    def combine(self, parts: Sequence[Branch], x_BTW: Tensor) -> Branch:
        """Combines the branches: window, chosen blocks and, if there are any, summaries."""
        out, lse = merge(parts)
        if self.gates is not None:
            # Each branch has its own softmax. Sinks, if any, compete with all branches together.
            gates = torch.sigmoid(self.gates(x_BTW)).unflatten(-1, (3, -1)).permute(2, 0, 3, 1)[..., None]
            out = sum(gate * part for gate, (part, _) in zip(gates, parts, strict=False))
        return out, lse

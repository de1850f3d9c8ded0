"""Native sparse attention where several ranks share a sequence: routed attention, and all summaries."""

import dataclasses
import math

from torch import Tensor

from kernels import Axis
from kernels.patterns import NativeSparse
from kernels.patterns.hierarchical import Summaries
from kernels.summaries.hierarchy import build_hierarchy
from model.attention.base import AttentionCore, AttentionOutput, Inputs
from model.attention.hierarchical.shard import SummaryShard
from model.attention.native_sparse.core import NativeSparseAttention, NativeSparseLayout
from model.attention.routed.shard import RoutedShard
from model.parallel.context import Context


class NativeSparseShard(RoutedShard):
    can_interleave = False

    @classmethod
    def unit(cls, pattern: NativeSparse, block: int, length: int) -> int:
        span = pattern.summary_span if pattern.summary_span <= length else 1
        return math.lcm(super().unit(pattern, block, length), span)

    def __init__(self, pattern: NativeSparse, tokens: Axis, block: int, fixed: bool, context: Context) -> None:
        super().__init__(pattern, tokens, block, fixed, context)
        self.summaries, hierarchy = None, None
        if pattern.summary_span <= tokens.length:
            levels, queries = [Summaries(pattern.summary_span)], tokens.take(context.own)
            hierarchy = build_hierarchy(levels, tokens, block, fixed=fixed, queries=queries)
            self.summaries = SummaryShard(hierarchy, context)
        of_routed = {field.name: getattr(self.layout, field.name) for field in dataclasses.fields(self.layout)}
        self.layout = NativeSparseLayout(**of_routed, summaries=hierarchy)

    def attend(self, inputs: Inputs, core: NativeSparseAttention) -> AttentionOutput:
        pooled: tuple[Tensor, Tensor] | None = None
        if self.summaries is not None:
            keys, values = self.summaries.join(inputs, core.pool, core.backend)
            pooled = self.layout.summaries.join(keys), self.layout.summaries.join(values)
        inputs, block_summaries = self.receive(inputs, core)
        return core(inputs, self.layout, block_summaries, pooled)

    def bytes_sent(self, core: AttentionCore, key_bytes: int) -> tuple[int, int]:
        forward, backward = super().bytes_sent(core, key_bytes)
        if self.summaries is None:
            return forward, backward
        pooled = self.summaries.bytes_sent(core.kv_heads, core.head_dim, key_bytes)
        return forward + pooled[0], backward + pooled[1]

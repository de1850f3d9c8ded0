"""Routed attention where several ranks share a sequence: all ranks receive all keys, values and block summaries."""

import dataclasses
import math

import torch
from torch import Tensor

from kernels import Axis, build_layout
from kernels.layout.cost import AttentionCost
from kernels.patterns import Routed
from model.attention.base import AttentionCore, AttentionOutput, Inputs
from model.attention.routed.core import RoutedAttention, RoutedLayout
from model.attention.sequence_shard import SequenceShard
from model.parallel.context import Context
from model.parallel.ranges import take


class RoutedShard(SequenceShard):
    """A rank summarizes the blocks among its own tokens; a router compares its queries with the summaries of all."""

    @classmethod
    def unit(cls, pattern: Routed, block: int, length: int) -> int:
        return math.lcm(block, pattern.block)

    def __init__(self, pattern: Routed, tokens: Axis, block: int, fixed: bool, context: Context) -> None:
        super().__init__(pattern, tokens, block, fixed, context)
        assert all(r.start % pattern.block == len(r) % pattern.block == 0 for r in context.own), "whole blocks"
        self.gather = context.gather()
        self.gather_blocks = context.per_span(pattern.block).gather()
        index = torch.arange(context.length, dtype=torch.int32, device=tokens.device)
        query = take(index, context.own, 0)
        document_start = take(tokens.origin, context.own)
        self.local_start = document_start - (query - index[: len(query)])
        window = build_layout(pattern.local, tokens.take(context.own), tokens, block, fixed=fixed)
        self.layout = RoutedLayout(pattern, window, document_start, query, context.length)

    @property
    def overflow(self) -> Tensor | None:
        return self.layout.overflow

    def attend(self, inputs: Inputs, core: RoutedAttention) -> AttentionOutput:
        inputs, summaries = self.receive(inputs, core)
        return core(inputs, self.layout, summaries)

    def receive(self, inputs: Inputs, core: RoutedAttention) -> tuple[Inputs, Tensor]:
        """The inputs with the keys and values of all tokens, and the router's summaries of all blocks."""
        own = core.block_summaries(inputs, self.local_start.expand(len(inputs.q_BHTD), -1))
        (summaries,) = self.gather_blocks((own,), 2)
        k, v = self.gather((inputs.k_BKTD, inputs.v_BKTD), 2)
        return inputs._replace(k_BKTD=k, v_BKTD=v), summaries

    def cost(self, batch: int, heads: int, head_dim: int, selectors: int | None = None) -> AttentionCost:
        causal = self.context.causal_pairs() * batch * heads
        return dataclasses.replace(self.layout.cost(batch, heads, head_dim, selectors), causal_pairs=causal)

    def bytes_sent(self, core: AttentionCore, key_bytes: int) -> tuple[int, int]:
        """Block summaries are in float32 at least. Those of an indexer alone have gradients."""
        assert isinstance(core, RoutedAttention)
        has_indexer = core.indexer is not None
        summary = core.pattern.indexer_dim if has_indexer else core.kv_heads * core.head_dim
        summary *= max(4, key_bytes)
        token = 2 * core.kv_heads * core.head_dim * key_bytes
        (forward, backward), (blocks, block_gradients) = self.gather.sent(), self.gather_blocks.sent()
        return forward * token + blocks * summary, backward * token + block_gradients * summary * has_indexer

"""Hierarchical attention where several ranks share a sequence: a halo of tokens, and all summaries.

A rank makes the summaries of the spans that begin among its tokens. The last of them may end among the next rank's
tokens, so it receives those of one coarsest span; then every summary is made of the same tokens as on one rank. The
summaries, few, go to all ranks.
"""

import dataclasses
import math

import torch
from torch import Tensor

from kernels import Axis, attention
from kernels.layout.concatenate import concatenate_keys
from kernels.layout.cost import AttentionCost
from kernels.patterns import Hierarchical
from kernels.summaries.hierarchy import Hierarchy, Level, build_hierarchy
from model.attention.base import AttentionOutput, Inputs, unused
from model.attention.hierarchical.core import HierarchicalAttention
from model.attention.hierarchical.pooling import SummaryPool
from model.attention.sequence_shard import SequenceShard
from model.parallel.context import Context
from model.parallel.exchange import Exchange
from model.parallel.ranges import Ranges, reach


class SummaryShard:
    """The summaries of the levels of `hierarchy`, whose spans are those of the whole sequence."""

    def __init__(self, hierarchy: Hierarchy, context: Context) -> None:
        levels = [level for level in hierarchy.levels if level.span > 1]
        spans = [level.span for level in levels]
        (own,) = context.own
        assert not any(own.start % span or len(own) % span for span in spans), "a rank holds whole spans"
        self.following = context.halo(after=spans[-1])
        (pooled,) = self.following.wanted_here
        local = tuple(_within(level, pooled) for level in levels)
        self.hierarchy = dataclasses.replace(hierarchy, levels=local)  # of it, pooling reads levels and block alone
        self.own_slots = [len(own) // span for span in spans]
        self.slots = [context.length // span for span in spans]
        # Slots of all levels, one level behind the other, are the axis of one all-gather.
        first = [sum(self.slots[:i]) for i in range(len(spans))]
        held = [
            tuple(range(a + each.start // s, a + each.stop // s) for a, s in zip(first, spans, strict=True))
            for (each,) in context.held
        ]
        whole: Ranges = (range(sum(self.slots)),)
        self.gather = Exchange(context.group, held, [whole] * len(held))

    def join(self, inputs: Inputs, pool: SummaryPool, backend: str) -> tuple[list[Tensor], list[Tensor]]:
        """Keys and values `[batch, kv_heads, slots, head_dim]` of each level."""
        given = inputs.unrotated_k_BTKD, inputs.v_BKTD.transpose(1, 2), *inputs.rotation
        unrotated, values, cos, sin = self.following(given, 1)
        joined = pool.join(self.hierarchy, None, unrotated, values, (cos, sin), backend)
        sizes = [-(-level.axis.length // self.hierarchy.layout.block) for level in self.hierarchy.levels]
        sizes = [size * self.hierarchy.layout.block for size in sizes]
        own = [
            torch.cat([x[:, :, :n] for x, n in zip(each.split(sizes, 2), self.own_slots, strict=True)], 2)
            for each in joined
        ]
        keys, values = self.gather(own, 2)
        return list(keys.split(self.slots, 2)), list(values.split(self.slots, 2))

    def bytes_sent(self, kv_heads: int, head_dim: int, key_bytes: int) -> tuple[int, int]:
        """As SequenceShard.bytes_sent. Rotations are in float32 and have no gradient."""
        key = 2 * kv_heads * head_dim * key_bytes
        tokens, gradients = self.following.sent()
        slots, slot_gradients = self.gather.sent()
        return tokens * (key + 4 * head_dim) + slots * key, (gradients + slot_gradients) * key


class HierarchicalShard(SequenceShard):
    can_interleave = False

    @classmethod
    def unit(cls, pattern: Hierarchical, block: int, length: int) -> int:
        return math.lcm(block, *(span for span in pattern.spans if span <= length))

    def __init__(self, pattern: Hierarchical, tokens: Axis, block: int, fixed: bool, context: Context) -> None:
        super().__init__(pattern, tokens, block, fixed, context)
        before = reach(pattern.levels[0], context.length)
        self.near = context.gather() if before is None else context.halo(-(-before // block) * block)
        of_tokens = {"queries": tokens.take(context.own), "token_keys": tokens.take(self.near.wanted_here)}
        self.hierarchy = build_hierarchy(pattern, tokens, block, fixed=fixed, **of_tokens)
        self.summaries = SummaryShard(self.hierarchy, context) if self.hierarchy.levels[1:] else None

    @property
    def overflow(self) -> Tensor | None:
        return self.hierarchy.overflow

    def attend(self, inputs: Inputs, core: HierarchicalAttention) -> AttentionOutput:
        near_k, near_v = self.near((inputs.k_BKTD, inputs.v_BKTD), 2)
        keys, values = [near_k], [near_v]
        if self.summaries is not None:
            more_keys, more_values = self.summaries.join(inputs, core.pool, core.backend)
            keys, values = keys + more_keys, values + more_values
        layout = self.hierarchy.layout
        k, v = (concatenate_keys(each, layout.block) for each in (keys, values))
        out, lse = attention(inputs.q_BHTD, k, v, layout, return_lse=True, backend=core.backend)
        return AttentionOutput(out, lse, unused(core.pool) if core.training and self.summaries is None else None)

    def cost(self, batch: int, heads: int, head_dim: int) -> AttentionCost:
        causal = self.context.causal_pairs() * batch * heads
        return dataclasses.replace(self.hierarchy.cost(batch, heads, head_dim), causal_pairs=causal)

    def bytes_sent(self, core: HierarchicalAttention, key_bytes: int) -> tuple[int, int]:
        forward, backward = self.near.sent()
        token = 2 * core.kv_heads * core.head_dim * key_bytes
        sent = [(forward * token, backward * token)]
        if self.summaries is not None:
            sent.append(self.summaries.bytes_sent(core.kv_heads, core.head_dim, key_bytes))
        return tuple(map(sum, zip(*sent, strict=True)))


def _within(level: Level, tokens: range) -> Level:
    """The slots of a level that `tokens` hold, counted from the first of them. A span that ends beyond them is empty:
    its summary is another rank's."""
    axis = level.axis.take([range(tokens.start // level.span, tokens.stop // level.span)])
    origin = axis.origin - tokens.start
    end = torch.where(origin + axis.end <= len(tokens), axis.end, axis.start)
    axis = dataclasses.replace(axis, end=end, origin=origin)
    return Level(level.span, axis, level.pairs, torch.stack([axis.start, axis.end, axis.origin], 1))

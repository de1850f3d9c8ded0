"""Masks over the tokens where several ranks share a sequence: each receives the keys in reach of its queries."""

import dataclasses
from collections.abc import Sequence

from torch import Tensor

from kernels import Axis, build_layout
from kernels.layout.cost import AttentionCost
from kernels.patterns import Pattern
from model.attention.base import AttentionCore, AttentionOutput, Inputs
from model.attention.sequence_shard import SequenceShard
from model.parallel.context import Context
from model.parallel.ranges import reach


class MaskedShard(SequenceShard):
    """A pattern of limited reach receives a halo, whole blocks before each of its ranges; any other one all tokens."""

    def __init__(
        self, pattern: Pattern | Sequence[Pattern], tokens: Axis, block: int, fixed: bool, context: Context
    ) -> None:
        super().__init__(pattern, tokens, block, fixed, context)
        before = reach(pattern, context.length)
        self.exchange = context.gather() if before is None else context.halo(-(-before // block) * block)
        keys = tokens.take(self.exchange.wanted_here)
        self.layout = build_layout(pattern, tokens.take(context.own), keys, block, fixed=fixed)

    @property
    def overflow(self) -> Tensor | None:
        return self.layout.overflow

    def attend(self, inputs: Inputs, core: AttentionCore) -> AttentionOutput:
        k, v = self.exchange((inputs.k_BKTD, inputs.v_BKTD), 2)
        return AttentionOutput(*core(inputs._replace(k_BKTD=k, v_BKTD=v), self.layout))

    def cost(self, batch: int, heads: int, head_dim: int) -> AttentionCost:
        causal = self.context.causal_pairs() * batch * heads
        return dataclasses.replace(self.layout.cost(batch, heads, head_dim), causal_pairs=causal)

    def bytes_sent(self, core: AttentionCore, key_bytes: int) -> tuple[int, int]:
        forward, backward = self.exchange.sent()
        token = 2 * core.kv_heads * core.head_dim * key_bytes
        return forward * token, backward * token

"""What is made of whole spans of tokens, as they fill: pooled keys and values, or a router's key a block.

What a span has so far, and cannot be summarized yet, waits as `Pending` pieces: tokens for the finest level, summaries
of the finer level for the others. The summaries that queries attend to have a store a level, in units of its span.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from kernels.layout.cached_keys import CachedKeys
from kernels.patterns.hierarchical import Summaries
from kernels.summaries.span_pooling import pool_spans
from model.attention.base import Inputs
from model.attention.hierarchical.pooling import SummaryPool
from model.kv_cache.cache_layout import CacheLayout, Read
from model.kv_cache.spans import Filled, Pending
from model.kv_cache.step import Step
from model.kv_cache.store import Store
from model.rope import rotate


class NewSummaries(Filled):
    """And what attention needs to know of them: `mask`, which queries of the chunk see them; `cos`, `sin`, of their
    rotation."""

    def __init__(self, step: Step, slots: CacheLayout, finer: int) -> None:
        super().__init__(step, slots.span, finer)
        if self.units:
            self.mask = slots.visible(step.position, self.unit)
            self.cos, self.sin = step.rotary(self.unit * slots.span + slots.span // 2)


class SummaryCachePlanner:
    """What the layers of one pattern share of its levels of summaries, from fine to coarse."""

    def __init__(self, levels: Sequence[Summaries], batch: int, device: torch.device) -> None:
        self.levels = [CacheLayout(level, batch, device, span=level.span) for level in levels]

    def plan(self, step: Step) -> list[tuple[list[Read], NewSummaries, tuple[Tensor, Tensor] | None]]:
        """By level: what the chunk reads of it, what it adds to it, and where that goes."""
        found, finer = [], 1
        for slots in self.levels:
            reads, new = step.read(slots), NewSummaries(step, slots, finer)
            found.append((reads, new, slots.write(new.units, new.before, new.new) if new.units else None))
            finer = slots.span
        return found


class SummaryStores:
    """One layer's summaries."""

    def __init__(self, planner: SummaryCachePlanner) -> None:
        self.stores = [Store(slots) for slots in planner.levels]
        self._pending = [Pending() for _ in planner.levels]

    def make(
        self, inputs: Inputs, pool: SummaryPool, planned: list
    ) -> tuple[list[tuple[Read, CachedKeys]], list[CachedKeys]]:
        """(what the chunk reads of earlier summaries, the summaries that it fills): to `write` when both are used."""
        reads, v = zip(self.stores, planned, strict=True), inputs.v_BKTD
        past = [part for store, (read, *_) in reads for part in store.read(read, v)]
        return past, self._summarize(inputs, pool, [new for _, new, _ in planned])

    def write(self, fresh: list[CachedKeys], planned: list) -> None:
        """Keeps the new summaries. What was read is a view, so that it must not be needed any more."""
        for store, part, (*_, where) in zip(self.stores, fresh, planned, strict=False):
            store.write(part.k, part.v, where)

    def tensors(self) -> list[Tensor]:
        """All that it remembers."""
        return [tensor for part in (*self.stores, *self._pending) for tensor in part.tensors()]

    def _summarize(self, inputs: Inputs, summary_pool: SummaryPool, filled: list[NewSummaries]) -> list[CachedKeys]:
        """The new summaries of the levels that have any (the finest), as SummaryPool.forward makes them."""
        dtype, parts = inputs.v_BKTD.dtype, []
        pieces = inputs.unrotated_k_BTKD, inputs.v_BKTD.transpose(1, 2)
        for index, (level, pending) in enumerate(zip(filled, self._pending, strict=True)):
            taken = pending.take(level, pieces)
            if taken is None:
                break
            pieces = pool_spans(*taken, summary_pool.scores(index, taken[0]))
            keys = rotate(pieces[0], level.cos, level.sin)
            parts.append(CachedKeys(keys.to(dtype).transpose(1, 2), pieces[1].to(dtype).transpose(1, 2), level.mask))
        return parts

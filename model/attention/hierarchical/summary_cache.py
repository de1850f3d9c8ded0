"""The summaries in a cache: keys and values of whole spans, pooled when the span is full.

The pieces of a span that is not full yet are `Pending`: tokens for the finest level, summaries of the next finer level
for the others. Each level of summaries has a store, whose units are spans.
"""

from collections.abc import Sequence

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
from model.rope import RotaryEmbedding, rotate


class NewSummaries(Filled):
    """The spans that a chunk fills, with the `mask` of the queries that see their summaries, and the `cos` and `sin` of
    the summaries' rotation."""

    def __init__(self, step: Step, layout: CacheLayout, finer: int, rotary: RotaryEmbedding) -> None:
        super().__init__(step, layout.span, finer)
        if self.units:
            self.mask = layout.visible(step.position, self.unit)
            self.cos, self.sin = rotary(self.unit * layout.span + layout.span // 2)


class SummaryCachePlanner:
    """The plan of a step for all levels of summaries, from fine to coarse; layers of one pattern and one `rotary` share
    it."""

    def __init__(self, levels: Sequence[Summaries], batch: int, rotary: RotaryEmbedding) -> None:
        self.levels = [CacheLayout(level, batch, rotary.device, span=level.span) for level in levels]
        self.rotary = rotary

    def plan(self, step: Step) -> list[tuple[list[Read], NewSummaries, tuple[Tensor, Tensor] | None]]:
        """For each level: the reads of the chunk, the new summaries, and the slots of these."""
        found, finer = [], 1
        for layout in self.levels:
            reads, new = step.read(layout), NewSummaries(step, layout, finer, self.rotary)
            found.append((reads, new, layout.write(new.units, new.before, new.new) if new.units else None))
            finer = layout.span
        return found


class SummaryStores:
    """The summaries of one layer, and the pieces of spans that are not full yet."""

    def __init__(self, planner: SummaryCachePlanner) -> None:
        self.stores = [Store(layout) for layout in planner.levels]
        self._pending = [Pending() for _ in planner.levels]

    def make(
        self, inputs: Inputs, pool: SummaryPool, planned: list
    ) -> tuple[list[tuple[Read, CachedKeys]], list[CachedKeys]]:
        """Returns the cached summaries that the chunk reads, and its new summaries. After their use, call `write`."""
        reads, v = zip(self.stores, planned, strict=True), inputs.v_BKTD
        past = [part for store, (read, *_) in reads for part in store.read(read, v)]
        return past, self._summarize(inputs, pool, [new for _, new, _ in planned])

    def write(self, fresh: list[CachedKeys], planned: list) -> None:
        """Adds the new summaries to the cache. This invalidates the cached summaries that `make` returned, as views."""
        for store, part, (*_, where) in zip(self.stores, fresh, planned, strict=False):
            store.write(part.k, part.v, where)

    def tensors(self) -> list[Tensor]:
        """All tensors of the stores and of the pending pieces."""
        return [tensor for part in (*self.stores, *self._pending) for tensor in part.tensors()]

    def _summarize(self, inputs: Inputs, summary_pool: SummaryPool, filled: list[NewSummaries]) -> list[CachedKeys]:
        """The new summaries of all levels that have any, computed as in SummaryPool.forward."""
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

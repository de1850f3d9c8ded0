"""The cache of hierarchical attention: nearby tokens, and summaries that are computed when their spans are full.

Every level has a store: the tokens and the finer levels of summaries a ring, the coarsest level a list that grows by
one summary per span."""

from torch import Tensor

from kernels.layout.cached_keys import CachedKeys
from kernels.patterns import Hierarchical
from model.attention.base import Inputs
from model.attention.hierarchical.core import HierarchicalAttention
from model.attention.hierarchical.summary_cache import SummaryCachePlanner, SummaryStores
from model.attention.layer_cache import LayerCache
from model.attention.masked.cache import MaskedCachePlanner
from model.kv_cache.chunk_attention import attend_to_all
from model.kv_cache.step import Step
from model.kv_cache.store import Store
from model.rope import RotaryEmbedding


class HierarchicalCachePlanner:
    """The plan of a step, which the layers of one pattern share."""

    def __init__(self, pattern: Hierarchical, batch: int, rotary: RotaryEmbedding) -> None:
        tokens, *levels = pattern.levels
        self.tokens = MaskedCachePlanner(tokens, batch, rotary)
        self.summaries = SummaryCachePlanner(levels, batch, rotary)

    def plan(self, step: Step) -> tuple:
        """The plans of the tokens and of the summaries."""
        return self.tokens.plan(step), self.summaries.plan(step)


class HierarchicalCache(LayerCache):
    planner_class = HierarchicalCachePlanner

    def __init__(self, planner: HierarchicalCachePlanner) -> None:
        self.planner = planner
        self.summaries = SummaryStores(planner.summaries)
        self.stores = [Store(planner.tokens.layout), *self.summaries.stores]

    def attend(self, inputs: Inputs, core: HierarchicalAttention) -> tuple[Tensor, Tensor]:
        planned = self.step.once(self.planner, lambda: self.planner.plan(self.step))
        (own, reads, where), of_summaries = planned
        tokens, k, v = self.stores[0], inputs.k_BKTD, inputs.v_BKTD
        past, fresh = self.summaries.make(inputs, core.pool, of_summaries)
        found = attend_to_all(
            inputs.q_BHTD, CachedKeys(k, v, own), [*tokens.read(reads, k), *past], fresh, core.backend
        )
        tokens.write(k, v, where)
        self.summaries.write(fresh, of_summaries)
        return found

    def tensors(self) -> list[Tensor]:
        return [*self.stores[0].tensors(), *self.summaries.tensors()]

"""The cache of a layer that attends hierarchically: tokens nearby, and summaries that are built as their spans fill.

Every level has a store of its own: the tokens a ring, each level of summaries one in units of its span, the coarsest a
list that grows by one summary a span.
"""

import torch
from torch import Tensor

from kernels.layout.cached_keys import CachedKeys
from kernels.patterns import Hierarchical
from model.attention import Inputs
from model.attention.hierarchical import HierarchicalAttention
from model.decoding.masked_cache import MaskedCachePlanner
from model.decoding.step import Step, attend_to_all
from model.decoding.store import Store
from model.decoding.summary_cache import SummaryCachePlanner, SummaryStores


class HierarchicalCachePlanner:
    """What the layers of one pattern share."""

    def __init__(self, pattern: Hierarchical, batch: int, device: torch.device) -> None:
        tokens, *levels = pattern.levels
        self.tokens = MaskedCachePlanner(tokens, batch, device)
        self.summaries = SummaryCachePlanner(levels, batch, device)

    def plan(self, step: Step) -> tuple:
        """Of the tokens, and of the summaries."""
        return self.tokens.plan(step), self.summaries.plan(step)


class HierarchicalCache:
    """One layer's: model.attention.Cached."""

    def __init__(self, planner: HierarchicalCachePlanner) -> None:
        self.planner = planner
        self.summaries = SummaryStores(planner.summaries)
        self.stores = [Store(planner.tokens.slots), *self.summaries.stores]
        self.step: Step | None = None

    def attend(self, inputs: Inputs, family: HierarchicalAttention) -> tuple[Tensor, Tensor]:
        planned = self.step.once(self.planner, lambda: self.planner.plan(self.step))
        (own, reads, where), of_summaries = planned
        tokens, k, v = self.stores[0], inputs.k_BKTD, inputs.v_BKTD
        past, fresh = self.summaries.make(inputs, family.pool, of_summaries)
        found = attend_to_all(
            inputs.q_BHTD, CachedKeys(k, v, own), [*tokens.read(reads, k), *past], fresh, family.backend
        )
        tokens.write(k, v, where)
        self.summaries.write(fresh, of_summaries)
        return found

    def tensors(self) -> list[Tensor]:
        """All that it remembers."""
        return [*self.stores[0].tensors(), *self.summaries.tensors()]

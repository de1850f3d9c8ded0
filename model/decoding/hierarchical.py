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
from model.decoding.plain import PlainBookkeeping
from model.decoding.step import Step, attend_to_all
from model.decoding.store import Store
from model.decoding.summaries import SummaryBookkeeping, SummaryStores


class HierarchicalBookkeeping:
    """What the layers of one pattern share."""

    def __init__(self, pattern: Hierarchical, batch: int, device: torch.device) -> None:
        tokens, *levels = pattern.levels
        self.tokens = PlainBookkeeping(tokens, batch, device)
        self.summaries = SummaryBookkeeping(levels, batch, device)

    def look(self, step: Step) -> tuple:
        """Of the tokens, and of the summaries."""
        return self.tokens.look(step), self.summaries.look(step)


class HierarchicalCache:
    """One layer's: model.attention.Cached."""

    def __init__(self, bookkeeping: HierarchicalBookkeeping) -> None:
        self.bookkeeping = bookkeeping
        self.summaries = SummaryStores(bookkeeping.summaries)
        self.stores = [Store(bookkeeping.tokens.slots), *self.summaries.stores]
        self.step: Step | None = None

    def attend(self, inputs: Inputs, family: HierarchicalAttention) -> tuple[Tensor, Tensor]:
        looked = self.step.once(self.bookkeeping, lambda: self.bookkeeping.look(self.step))
        (own, reads, where), of_summaries = looked
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

"""The cache of a layer with NSA's three branches: that of routed attention, and the summaries of all past spans."""

import torch
from torch import Tensor

from kernels.patterns import NativeSparse
from kernels.patterns.hierarchical import Summaries
from model.attention import Inputs
from model.attention.native_sparse import NativeSparseAttention
from model.decoding.routed import RoutedBookkeeping, RoutedCache
from model.decoding.step import Step, attend_to_parts, attend_to_past
from model.decoding.summaries import SummaryBookkeeping, SummaryStores


class NativeSparseBookkeeping(RoutedBookkeeping):
    """What the layers of one pattern share."""

    def __init__(self, pattern: NativeSparse, batch: int, device: torch.device) -> None:
        super().__init__(pattern, batch, device)
        self.summaries = SummaryBookkeeping([Summaries(pattern.summary_span)], batch, device)

    def look(self, step: Step) -> tuple:
        """Of the window and the blocks, and of the summaries."""
        return super().look(step), self.summaries.look(step)


class NativeSparseCache(RoutedCache):
    """One layer's: model.attention.Cached."""

    def __init__(self, bookkeeping: NativeSparseBookkeeping) -> None:
        super().__init__(bookkeeping)
        self.summaries = SummaryStores(bookkeeping.summaries)
        self.stores += self.summaries.stores

    def attend(self, inputs: Inputs, family: NativeSparseAttention) -> tuple[Tensor, Tensor]:
        looked, of_summaries = self.step.once(self.bookkeeping, lambda: self.bookkeeping.look(self.step))
        q, backend = inputs.q_BHTD, family.backend
        past, fresh = self.summaries.make(inputs, family.pool, of_summaries)
        if self.step.chunk > 1:
            branches = self.window_and_routed(inputs, family, looked)
            branches.append(attend_to_past(q, past, fresh, backend))
        else:
            window, picked = self.parts_of_one(inputs, family, looked)
            summaries = [*(part for _, part in past), *fresh]
            # Without gates the three are one softmax.
            joined = [[*window, *picked, *summaries]] if family.gates is None else [window, picked, summaries]
            branches = [attend_to_parts(q, parts, backend) for parts in joined]
        self.summaries.write(fresh, of_summaries)
        return family.combine(branches, inputs.x_BTW)

    def tensors(self) -> list[Tensor]:
        """All that it remembers."""
        # Its summaries' stores are among its stores.
        return list(dict.fromkeys([*super().tensors(), *self.summaries.tensors()]))

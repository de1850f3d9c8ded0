"""The cache of native sparse attention: that of routed attention, and the summaries of all past spans."""

from torch import Tensor

from kernels.patterns import NativeSparse
from kernels.patterns.hierarchical import Summaries
from model.attention.base import Inputs
from model.attention.hierarchical.summary_cache import SummaryCachePlanner, SummaryStores
from model.attention.native_sparse.core import NativeSparseAttention
from model.attention.routed.cache import RoutedCache, RoutedCachePlanner
from model.kv_cache.chunk_attention import attend_to_parts, attend_to_past
from model.kv_cache.step import Step
from model.rope import RotaryEmbedding


class NativeSparseCachePlanner(RoutedCachePlanner):
    """The plan of a step, which the layers of one pattern share."""

    def __init__(self, pattern: NativeSparse, batch: int, rotary: RotaryEmbedding) -> None:
        super().__init__(pattern, batch, rotary)
        self.summaries = SummaryCachePlanner([Summaries(pattern.summary_span)], batch, rotary)

    def plan(self, step: Step) -> tuple:
        """The plans of routed attention and of the summaries."""
        return super().plan(step), self.summaries.plan(step)


class NativeSparseCache(RoutedCache):
    planner_class = NativeSparseCachePlanner

    def __init__(self, planner: NativeSparseCachePlanner) -> None:
        super().__init__(planner)
        self.summaries = SummaryStores(planner.summaries)
        self.stores += self.summaries.stores

    def attend(self, inputs: Inputs, core: NativeSparseAttention) -> tuple[Tensor, Tensor]:
        planned, of_summaries = self.step.once(self.planner, lambda: self.planner.plan(self.step))
        q, backend = inputs.q_BHTD, core.backend
        past, fresh = self.summaries.make(inputs, core.pool, of_summaries)
        if self.step.chunk > 1:
            branches = self.window_and_routed(inputs, core, planned)
            branches.append(attend_to_past(q, past, fresh, backend))
        else:
            window, picked = self.keys_of_one_token(inputs, core, planned)
            summaries = [*(part for _, part in past), *fresh]
            # Without gates, one softmax covers all three branches.
            joined = [[*window, *picked, *summaries]] if core.gates is None else [window, picked, summaries]
            branches = [attend_to_parts(q, parts, backend) for parts in joined]
        self.summaries.write(fresh, of_summaries)
        return core.combine(branches, inputs.x_BTW)

    def tensors(self) -> list[Tensor]:
        # The stores of the summaries are in both lists.
        return list(dict.fromkeys([*super().tensors(), *self.summaries.tensors()]))

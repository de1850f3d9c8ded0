"""The cache of attention under a mask over the tokens."""

from collections.abc import Sequence

from torch import Tensor

from kernels.layout.cached_keys import CachedKeys
from kernels.patterns import Pattern
from model.attention.base import AttentionCore, Inputs
from model.attention.layer_cache import LayerCache
from model.kv_cache.cache_layout import CacheLayout
from model.kv_cache.chunk_attention import attend_to_all
from model.kv_cache.step import Step
from model.kv_cache.store import Store
from model.rope import RotaryEmbedding


class MaskedCachePlanner:
    """The plan of a step, which the layers of one pattern (or of one pattern per KV head) share."""

    def __init__(self, pattern: Pattern | Sequence[Pattern], batch: int, rotary: RotaryEmbedding) -> None:
        self.layout = CacheLayout(pattern, batch, rotary.device)

    def plan(self, step: Step) -> tuple:
        """The mask or layout within the chunk, the reads of the cache, and the slots of the new keys."""
        own, reads = step.own(self.layout), step.read(self.layout)
        return own, reads, self.layout.write(step.chunk, step.lengths, step.new)


class MaskedCache(LayerCache):
    planner_class = MaskedCachePlanner

    def __init__(self, planner: MaskedCachePlanner) -> None:
        self.planner = planner
        self.stores = [Store(planner.layout)]

    def attend(self, inputs: Inputs, core: AttentionCore) -> tuple[Tensor, Tensor]:
        own, reads, where = self.step.once(self.planner, lambda: self.planner.plan(self.step))
        (store,), k, v = self.stores, inputs.k_BKTD, inputs.v_BKTD
        found = attend_to_all(inputs.q_BHTD, CachedKeys(k, v, own), store.read(reads, k), [], core.backend)
        store.write(k, v, where)
        return found

    def tensors(self) -> list[Tensor]:
        return self.stores[0].tensors()

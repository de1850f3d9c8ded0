"""The base class of the families' caches: the keys and values of one layer during decoding."""

from collections.abc import Sequence
from typing import ClassVar, Protocol

from torch import Tensor

from kernels.patterns import Pattern
from model.attention.base import AttentionCore, Inputs
from model.kv_cache.step import Step
from model.kv_cache.store import Store
from model.rope import RotaryEmbedding


class CachePlanner(Protocol):
    """The part of a cache that layers with the same pattern and the same rotary embeddings share."""

    def __init__(self, pattern: Pattern | Sequence[Pattern], batch: int, rotary: RotaryEmbedding) -> None: ...


class LayerCache:
    """The keys and values of one layer. In a forward pass it takes the place of the layer's layout: the tokens of the
    batch attend to each other and to the cached tokens, and are then added to the cache.

    `stores`: all its keys and values. `step`: the current chunk of tokens, which `Cache.run` sets.
    """

    planner_class: ClassVar[type[CachePlanner]]
    stores: Sequence[Store]
    step: Step

    def __init__(self, planner: CachePlanner) -> None:
        raise NotImplementedError

    def attend(self, inputs: Inputs, core: AttentionCore) -> tuple[Tensor, Tensor]:
        """(out, lse) as AttentionCore.forward returns them. `core`: the layer's own."""
        raise NotImplementedError

    def tensors(self) -> list[Tensor]:
        """All tensors of the cache, including those of spans that are not full yet."""
        raise NotImplementedError

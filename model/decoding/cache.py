"""The keys and values of all layers, filled and read chunk by chunk: a text of any length at bounded memory.

    cache = Cache(model, batch=2)
    hidden = cache.extend(tokens)                       # a chunk of the prompts
    hidden = cache.extend(more, new=[1, 0])             # one token more of the first sequence, none of the second

Attention over disjoint sets of keys composes exactly: the queries of a chunk attend to the chunk with the kernels of
training, and to the cached keys that their pattern makes visible; the two results are merged. For a chunk of a few
tokens, one product computes both.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from model.attention import family_of
from model.kv_cache.cache_layout import CacheLayout
from model.kv_cache.step import MAX_UNTILED_TOKENS, Step
from model.transformer import Transformer

ROUTER_BYTES = 4
"""Bytes of one number of a router's keys, which are float32 for weights of at most 32 bits."""


class Cache:
    """The key-value cache of a model, for `batch` sequences of different lengths.

    Raises ValueError for a pattern whose family has no cache.
    """

    def __init__(self, model: Transformer, batch: int) -> None:
        self.model, self.batch = model, batch
        self.lengths = [0] * batch
        self._layers, shared = [], {}
        for pattern, rotary in zip(model.patterns, model.rotaries, strict=True):
            family = family_of(pattern)
            if family.cache is None:
                raise ValueError(f"pattern={pattern}: its family {family.core.__name__} has no cache to decode with")
            if (pattern, rotary) not in shared:
                shared[pattern, rotary] = family.cache.planner_class(pattern, batch, rotary)
            self._layers.append(family.cache(shared[pattern, rotary]))

    @torch.no_grad()
    def extend(self, tokens: Tensor, new: Sequence[int] | None = None) -> Tensor:
        """Adds a chunk to the cache: tokens int64 `[batch, chunk]` -> final hidden states `[batch, chunk, width]`.

        `new`: how many tokens, counted from the left, belong to each sequence (None: all). The others are padding, and
        their hidden states are arbitrary. Raises ValueError if a sequence would exceed model.max_length.
        """
        chunk = tokens.shape[1]
        new = [chunk] * self.batch if new is None else list(new)
        after = self.check(new)
        hidden = self.run(tokens, Step(self.lengths, new, chunk, self.model.plan.block, tokens.device))
        self.lengths = after
        return hidden

    def check(self, new: Sequence[int]) -> list[int]:
        """Returns the lengths after `new` more tokens. Raises ValueError if one would exceed model.max_length."""
        after = [length + more for length, more in zip(self.lengths, new, strict=True)]
        if max(after) > self.model.config.max_length:
            raise ValueError(
                f"a sequence of {max(after)} tokens: the model takes {self.model.config.max_length} (model.max_length)"
            )
        return after

    def run(self, tokens: Tensor, step: Step) -> Tensor:
        """Runs the model on the tokens of a step. The caller updates `lengths`."""
        for layer in self._layers:
            layer.step = step
        return self.model(tokens, step.position, self._layers)

    def reserve(self, capacity: int) -> None:
        """Reserves room for `capacity` tokens of every sequence, and prepares for steps of fixed shapes (FixedStep)."""
        for layout in self.layouts():
            layout.reserve(-(-capacity // layout.span), MAX_UNTILED_TOKENS)

    def set_lengths(self, lengths: Sequence[int]) -> None:
        """Sets the host's lengths of the sequences, which a step of fixed shapes does not update."""
        self.lengths = list(lengths)
        for layout in self.layouts():
            layout.longest = max(lengths) // layout.span

    def tensors(self) -> list[Tensor]:
        """All tensors of the caches of the layers."""
        return [tensor for layer in self._layers for tensor in layer.tensors()]

    def layouts(self) -> list[CacheLayout]:
        """The layouts of all stores, each once; layers of one pattern share them."""
        return list(dict.fromkeys(store.layout for layer in self._layers for store in layer.stores))

    @property
    def bytes_stored(self) -> int:
        """Bytes of the keys and values that later tokens may read, if every sequence were as long as the longest."""
        return sum(store.layout.used * store.bytes_a_slot for layer in self._layers for store in layer.stores)

    @property
    def bytes_a_number(self) -> int:
        """Bytes of one element of the keys and values; 0 if the cache is empty."""
        return max(store.bytes_a_number for layer in self._layers for store in layer.stores)

    @property
    def bytes_allocated(self) -> int:
        """Bytes of the stores, without the tokens of spans that are not full yet."""
        return sum(store.capacity * store.bytes_a_slot for layer in self._layers for store in layer.stores)

    @property
    def bytes_read(self) -> int:
        """Bytes of the cached keys and values that the last `extend` read, summed over its groups of queries."""
        return sum(store.keys_read * store.bytes_a_slot for layer in self._layers for store in layer.stores)


def expected_bytes(model: Transformer, context: int, batch: int, number: int | None = None) -> tuple[int, int]:
    """The (stored, read) bytes of keys, values and routers' keys in all layers, when a token follows `context` others.

    `number`: bytes of one element of keys and values; by default that of the weights (under autocast it is smaller).
    """
    weight = model.embed_tokens.weight.element_size()
    sizes = weight if number is None else number, max(weight, ROUTER_BYTES)
    cores = dict(zip(model.patterns, model.cores, strict=True))
    costs = {pattern: core.decode_bytes(context, *sizes) for pattern, core in cores.items()}
    stored, read = (batch * sum(costs[pattern][each] for pattern in model.patterns) for each in (0, 1))
    return stored, read

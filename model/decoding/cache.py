"""The keys and values of all layers, filled and read chunk by chunk: a text of any length at bounded memory.

    cache = Cache(model, batch=2)
    hidden = cache.extend(tokens)                       # a chunk of the prompts
    hidden = cache.extend(more, new=[1, 0])             # one token more of the first sequence, none of the second

Attention over disjoint sets of keys composes exactly: a chunk's queries attend to the chunk by the kernels that
training uses, to what lies before it by the slots that their pattern still sees, and the two are merged. Where a chunk
is but a few tokens, both are one product.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from model.attention import family_of
from model.kv_cache.cache_layout import CacheLayout
from model.kv_cache.step import MAX_UNTILED_TOKENS, Step
from model.transformer import Transformer

ROUTER_BYTES = 4
"""Of a number of a router's keys: they are float32 (float64 in models of float64), whatever the weights."""


class Cache:
    """What a model remembers of `batch` sequences, each of its own length.

    Raises ValueError for a pattern whose family has no cache.
    """

    def __init__(self, model: Transformer, batch: int) -> None:
        self.model, self.batch = model, batch
        self.lengths = [0] * batch
        device, shared = model.embed_tokens.weight.device, {}
        self._layers = []
        for pattern in model.patterns:
            family = family_of(pattern)
            if family.cache is None:
                raise ValueError(f"pattern={pattern}: its family {family.core.__name__} has no cache to decode with")
            if pattern not in shared:
                shared[pattern] = family.cache.planner_class(pattern, batch, device)
            self._layers.append(family.cache(shared[pattern]))

    @torch.no_grad()
    def extend(self, tokens: Tensor, new: Sequence[int] | None = None) -> Tensor:
        """Reads a chunk: tokens int64 `[batch, chunk]` -> final hidden states `[batch, chunk, width]`.

        `new`: how many of them, from the left, belong to each sequence (None: all); what follows is padding, whose
        hidden states mean nothing. ValueError: a sequence would become longer than the model takes.
        """
        chunk = tokens.shape[1]
        new = [chunk] * self.batch if new is None else list(new)
        after = self.check(new)
        hidden = self.run(tokens, Step(self.lengths, new, chunk, self.model.plan.block, self.model.rotary))
        self.lengths = after
        return hidden

    def check(self, new: Sequence[int]) -> list[int]:
        """Lengths with so many tokens more. ValueError: a sequence would become longer than the model takes."""
        after = [length + more for length, more in zip(self.lengths, new, strict=True)]
        if max(after) > self.model.config.max_length:
            raise ValueError(
                f"a sequence of {max(after)} tokens: the model takes {self.model.config.max_length} (model.max_length)"
            )
        return after

    def run(self, tokens: Tensor, step: Step) -> Tensor:
        """A step's tokens through the model; `lengths` are the caller's to keep."""
        for layer in self._layers:
            layer.step = step
        return self.model(tokens, step.position, self._layers)

    def reserve(self, capacity: int) -> None:
        """Makes room for `capacity` tokens of every sequence, and prepares for steps of fixed shapes (FixedStep)."""
        for slots in self.layouts():
            slots.reserve(-(-capacity // slots.span), MAX_UNTILED_TOKENS)

    def set_lengths(self, lengths: Sequence[int]) -> None:
        """Sets the host's lengths of the sequences, which a step of fixed shapes does not update."""
        self.lengths = list(lengths)
        for slots in self.layouts():
            slots.longest = max(lengths) // slots.span

    def tensors(self) -> list[Tensor]:
        """All tensors of keys and values that the layers hold."""
        return [tensor for layer in self._layers for tensor in layer.tensors()]

    def layouts(self) -> list[CacheLayout]:
        """Which keys are kept, and where: one per list of keys of a pattern."""
        return list(dict.fromkeys(store.slots for layer in self._layers for store in layer.stores))

    @property
    def bytes_stored(self) -> int:
        """Of keys and values that later tokens may read, as if every sequence were as long as the longest."""
        return sum(store.slots.used * store.bytes_a_slot for layer in self._layers for store in layer.stores)

    @property
    def bytes_a_number(self) -> int:
        """Of one element of the keys and values that it holds; 0: it holds none."""
        return max(store.bytes_a_number for layer in self._layers for store in layer.stores)

    @property
    def bytes_allocated(self) -> int:
        """Of the stores; what waits to be summarized comes on top."""
        return sum(store.capacity * store.bytes_a_slot for layer in self._layers for store in layer.stores)

    @property
    def bytes_read(self) -> int:
        """Of what was kept that the last `extend` read, summed over its groups of queries."""
        return sum(store.keys_read * store.bytes_a_slot for layer in self._layers for store in layer.stores)


def expected_bytes(model: Transformer, context: int, batch: int, number: int | None = None) -> tuple[int, int]:
    """(stored, read) by the token behind `context` others, keys and values of all layers, and routers' keys:
    AttentionCore.decode_bytes. `number`: bytes of one, the weights' by default (under autocast a cache holds
    smaller ones)."""
    weight = model.embed_tokens.weight.element_size()
    sizes = weight if number is None else number, max(weight, ROUTER_BYTES)
    cores = dict(zip(model.patterns, model.cores, strict=True))
    costs = {pattern: core.decode_bytes(context, *sizes) for pattern, core in cores.items()}
    stored, read = (batch * sum(costs[pattern][each] for pattern in model.patterns) for each in (0, 1))
    return stored, read

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

from kernels import Axis, attention, build_layout, merge
from kernels.cost import decode_cost
from kernels.patterns import Pattern
from model.attention import Attend, Inputs
from model.decoding.direct import Part, attend
from model.decoding.slots import Read, Slots
from model.transformer import Transformer

FEW = 8
"""Tokens of a chunk up to which it is attended to without tiles; they are one group (slots.QUERIES_AT_ONCE)."""

GROWTH, PAGE = 1.25, 256
"""A store that is full becomes so much larger, in whole pages of slots."""

LayerPattern = Pattern | tuple[Pattern, ...]


class Cache:
    """What a model with mask patterns remembers of `batch` sequences, each of its own length.

    Raises ValueError for a pattern that decoding does not know.
    """

    def __init__(self, model: Transformer, batch: int) -> None:
        self.model, self.batch = model, batch
        self.lengths = [0] * batch
        device = model.embed_tokens.weight.device
        for pattern in dict.fromkeys(model.patterns):
            if not isinstance(pattern, tuple) and not pattern.is_mask:
                raise ValueError(f"pattern={pattern}: decoding knows patterns that are masks over the tokens")
        self._slots = {pattern: Slots(pattern, batch, device) for pattern in dict.fromkeys(model.patterns)}
        self._layers = [LayerCache(self._slots[pattern]) for pattern in model.patterns]

    @torch.no_grad()
    def extend(self, tokens: Tensor, new: Sequence[int] | None = None) -> Tensor:
        """Reads a chunk: tokens int64 `[batch, chunk]` -> final hidden states `[batch, chunk, width]`.

        `new`: how many of them, from the left, belong to each sequence (None: all); what follows is padding, whose
        hidden states mean nothing. ValueError: a sequence would become longer than the model takes.
        """
        chunk = tokens.shape[1]
        new = [chunk] * self.batch if new is None else list(new)
        longest, limit = max(map(sum, zip(self.lengths, new, strict=True))), self.model.config.max_length
        if longest > limit:
            raise ValueError(f"a sequence of {longest} tokens: the model takes {limit} (model.max_length)")
        device = tokens.device
        position = torch.tensor(self.lengths, device=device)[:, None] + torch.arange(chunk, device=device)
        step = Step(position, torch.tensor(new, device=device), self.lengths, longest, self.model.plan.block)
        for layer in self._layers:
            layer.step = step
        hidden = self.model(tokens, position, self._layers)
        self.lengths = [length + more for length, more in zip(self.lengths, new, strict=True)]
        return hidden

    @property
    def bytes_stored(self) -> int:
        """Of keys and values that later tokens may read, as if every sequence were as long as the longest."""
        return sum(layer.slots.used * layer.bytes_a_slot for layer in self._layers)

    @property
    def bytes_allocated(self) -> int:
        return sum(layer.capacity * layer.bytes_a_slot for layer in self._layers)

    @property
    def bytes_read(self) -> int:
        """Of keys and values before the chunk that the last `extend` read, summed over its groups of queries."""
        return sum(layer.keys_read * layer.bytes_a_slot for layer in self._layers)


def expected_bytes(model: Transformer, context: int, batch: int) -> tuple[int, int]:
    """(stored, read) by the token behind `context` others, keys and values of all layers: kernels.cost.decode_cost."""
    weight, config = model.embed_tokens.weight, model.config
    a_key = 2 * batch * config.kv_heads * config.head_dim * weight.element_size()
    costs = {pattern: decode_cost(pattern, context) for pattern in dict.fromkeys(model.patterns)}
    layers = [costs[pattern] for pattern in model.patterns]
    return a_key * sum(cost.stored for cost in layers), a_key * sum(cost.read for cost in layers)


class Step:
    """A chunk, as all layers see it; what layers of one pattern share is found out by the first of them.

    position int64 `[batch, chunk]`; new int64 `[batch]`, how many of the tokens are real; `lengths` before the chunk,
    and `longest` after it, on the host.
    """

    def __init__(self, position: Tensor, new: Tensor, lengths: Sequence[int], longest: int, block: int) -> None:
        self.position, self.new, self.longest, self.block = position, new, longest, block
        self.aligned = lengths[0] if len(set(lengths)) == 1 else None
        """The length of all sequences, where it is one."""
        self._shared: dict[int, tuple] = {}

    def shared(self, slots: Slots) -> tuple[list[Read], tuple[Tensor, Tensor], object]:
        """(what is read, where the chunk's keys go, how the chunk sees itself) for the layers with these slots: a
        BlockLayout, or a mask as in Part where there are few queries."""
        if id(slots) not in self._shared:
            reads = slots.read(self.position)
            own = self._own(slots)
            self._shared[id(slots)] = reads, slots.write(self.position.shape[1], self.new, self.longest), own
        return self._shared[id(slots)]

    def _own(self, slots: Slots) -> object:
        chunk = self.position.shape[1]
        if chunk <= FEW:
            return slots.visible(self.position, self.position)
        if self.aligned is not None:
            axis = Axis.tokens(chunk, device=self.position.device, offset=self.aligned)
        else:
            start = self.position.int()
            zero = torch.zeros_like(start)
            axis = Axis(start, start + 1, zero, zero)
        pattern = slots.patterns[0] if len(slots.patterns) == 1 else slots.patterns
        return build_layout(pattern, axis, block=self.block)


class LayerCache:
    """One layer's keys and values: model.attention.Cached."""

    def __init__(self, slots: Slots) -> None:
        self.slots = slots
        self.step: Step | None = None
        self.capacity = 0
        self.keys_read = 0
        """Slots that the last step read, summed over groups of queries."""
        self._k: Tensor | None = None
        self._v: Tensor | None = None

    @property
    def bytes_a_slot(self) -> int:
        """Of keys and values, all sequences and KV heads together."""
        return 0 if self._k is None else 2 * self._k[:, :, 0].numel() * self._k.element_size()

    def attend(self, inputs: Inputs, family: Attend) -> tuple[Tensor, Tensor]:
        q, k, v, scale = inputs.q_BHTD, inputs.k_BKTD, inputs.v_BKTD, inputs.q_BHTD.shape[-1] ** -0.5
        reads, where, own = self.step.shared(self.slots)
        self.keys_read = sum(read.mask.shape[3] for read in reads)
        stored = [Part(*self._read(read), read.mask) for read in reads]
        if isinstance(own, Tensor):
            assert len(reads) <= 1, "few queries are one group"
            out, lse = attend(q, [*stored, Part(k, v, own)], scale)
        else:
            out, lse = attention(q, k, v, own, return_lse=True, backend=family.backend)
            for read, part in zip(reads, stored, strict=True):
                rows = slice(read.first, read.stop)
                earlier = attend(q[:, :, rows], [part], scale)
                out[:, :, rows], lse[:, :, rows] = merge([earlier, (out[:, :, rows], lse[:, :, rows])])
        self._write(k, v, where)
        return out, lse

    def _read(self, read: Read) -> tuple[Tensor, Tensor]:
        if isinstance(read.slots, int):
            return self._k[:, :, : read.slots], self._v[:, :, : read.slots]
        index = read.slots[:, None, :, None].expand(-1, self._k.shape[1], -1, self._k.shape[3])
        return self._k.gather(2, index), self._v.gather(2, index)

    def _write(self, k: Tensor, v: Tensor, where: tuple[Tensor, Tensor]) -> None:
        self._grow(k)
        batch = torch.arange(len(k), device=k.device)[:, None]
        for slot in where:
            slot = torch.where(slot < 0, self.capacity, slot)  # the slot behind the last takes what nobody will read
            self._k[batch, :, slot] = k.transpose(1, 2)
            self._v[batch, :, slot] = v.transpose(1, 2)

    def _grow(self, like: Tensor) -> None:
        if self._k is not None and self.slots.needed <= self.capacity:
            return
        if self.slots.everything:
            wanted = int(max(self.slots.needed, self.capacity * GROWTH if self.capacity else 0))
            wanted = -(-wanted // PAGE) * PAGE
        else:
            extra = self.slots.needed - self.slots.ring
            wanted = self.slots.ring + (-(-int(extra * GROWTH) // PAGE) * PAGE if extra else 0)
        shape = (*like.shape[:2], wanted + 1, like.shape[3])
        for name in ("_k", "_v"):
            old, new = getattr(self, name), like.new_zeros(shape)
            if old is not None:
                new[:, :, : self.capacity] = old[:, :, : self.capacity]
            setattr(self, name, new)
        self.capacity = wanted

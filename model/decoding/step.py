"""A chunk of tokens on its way through the layers: what they share, and how they attend to it and to the past."""

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from kernels import Axis, BlockLayout, attention, build_layout, merge
from model.decoding.direct import Part, attend
from model.decoding.slots import QUERIES_AT_ONCE, Read, Slots
from model.rope import RotaryEmbedding

FEW = 8
"""Tokens of a chunk up to which it is attended to without tiles; they are one group (slots.QUERIES_AT_ONCE)."""


class Step:
    """`lengths` of the sequences before the chunk, and how many of its tokens are `new` to each: both on the host.
    `position` int64 `[batch, chunk]`: of its tokens, padding included."""

    def __init__(
        self, lengths: Sequence[int], new: Sequence[int], chunk: int, block: int, rotary: RotaryEmbedding
    ) -> None:
        self.lengths, self.new, self.chunk, self.block, self.rotary = list(lengths), list(new), chunk, block, rotary
        self.device = rotary.frequencies.device
        self.position = torch.tensor(self.lengths, device=self.device)[:, None] + torch.arange(
            chunk, device=self.device
        )
        self._found: dict[Hashable, Any] = {}

    def once(self, key: Hashable, find: Callable[[], Any]) -> Any:
        """What `find` gives, for the first layer that asks, and for all others."""
        if key not in self._found:
            self._found[key] = find()
        return self._found[key]

    def own(self, slots: Slots) -> BlockLayout | Tensor:
        """How the chunk's tokens see one another: a layout, or where there are few a mask as in Part."""
        if self.chunk <= FEW:
            return slots.visible(self.position, self.position)
        # One layout serves sequences of one length. It is needed once: an axis without a key is not kept.
        start = (self.position[:1] if len(set(self.lengths)) == 1 else self.position).int()
        axis = Axis(start, start + 1, torch.zeros_like(start), torch.zeros_like(start))
        pattern = slots.patterns[0] if len(slots.patterns) == 1 else slots.patterns
        return build_layout(pattern, axis, block=self.block)


def attend_to_all(
    q: Tensor, own: Part, past: Sequence[tuple[Read, Part]], fresh: Sequence[Part], backend: str
) -> tuple[Tensor, Tensor]:
    """One softmax over the chunk (`own`, whose mask may be a layout), what the store gives of the `past`, and `fresh`
    keys that the chunk has brought beside its tokens: (out, lse) as kernels.attention."""
    scale = q.shape[-1] ** -0.5
    tiles = not isinstance(own.mask, Tensor)
    assert tiles or q.shape[2] <= QUERIES_AT_ONCE, "few queries are one group"
    if tiles:
        out, lse = attention(q, own.k, own.v, own.mask, return_lse=True, backend=backend)
    for first in range(0, q.shape[2], QUERIES_AT_ONCE):
        rows = slice(first, first + QUERIES_AT_ONCE)
        parts = [part for read, part in past if read.first == first]
        parts += [part.of(rows) for part in fresh]
        if not tiles:
            return attend(q, [*parts, own], scale)
        if parts:
            merged = merge([attend(q[:, :, rows], parts, scale), (out[:, :, rows], lse[:, :, rows])])
            out[:, :, rows], lse[:, :, rows] = merged
    return out, lse


def attend_to_past(q: Tensor, past: Sequence[tuple[Read, Part]], fresh: Sequence[Part]) -> tuple[Tensor, Tensor]:
    """As `attend_to_all`, of keys that stand for no token of the chunk alone; 0 and -inf where there are none."""
    found = []
    for first in range(0, q.shape[2], QUERIES_AT_ONCE):
        rows = slice(first, first + QUERIES_AT_ONCE)
        parts = [part for read, part in past if read.first == first] + [part.of(rows) for part in fresh]
        if parts:
            found.append(attend(q[:, :, rows], parts, q.shape[-1] ** -0.5))
        else:
            found.append(nothing_seen(q[:, :, rows]))
    return torch.cat([out for out, _ in found], 2), torch.cat([lse for _, lse in found], 2)


def nothing_seen(q: Tensor) -> tuple[Tensor, Tensor]:
    """(out, lse) of queries without a key."""
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return torch.zeros_like(q), torch.full(q.shape[:3], -torch.inf, dtype=dtype, device=q.device)

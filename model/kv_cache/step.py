"""A step: one chunk of tokens that is read into a cache, with all that does not differ between layers."""

from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernels import Axis, BlockLayout, build_layout
from model.kv_cache.cache_layout import CacheLayout, Read
from model.rope import RotaryEmbedding

MAX_UNTILED_TOKENS = 8
"""Tokens of a chunk up to which it is attended to without tiles; they are one group (cache_layout.QUERIES_AT_ONCE)."""


class Units(NamedTuple):
    """Sequence by sequence: units that were full `before` a chunk, and `new` ones; on the host, or int64 `[batch]` on
    the device. `most`: of new ones of any sequence, which on the device is a bound."""

    before: Sequence[int] | Tensor
    new: Sequence[int] | Tensor
    most: int


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

    def units(self, span: int) -> Units:
        """What the chunk is in units of `span` tokens."""
        before = [length // span for length in self.lengths]
        after = [(length + new) // span for length, new in zip(self.lengths, self.new, strict=True)]
        new = [b - a for a, b in zip(before, after, strict=True)]
        return Units(before, new, max(new))

    def longest(self, slots: CacheLayout) -> int:
        """Tokens of the longest sequence behind the chunk; in a step of fixed shapes the most that there may be."""
        return max(length + new for length, new in zip(self.lengths, self.new, strict=True))

    def read(self, slots: CacheLayout) -> list[Read]:
        """What the chunk's tokens read of what is kept."""
        if self.chunk <= MAX_UNTILED_TOKENS or not slots.everything or not slots.longest:
            return slots.read(self.position)
        # Unit i is in slot i. In a ragged batch, what lies behind the end of a sequence is another document.
        unit = torch.arange(slots.longest, dtype=torch.int32, device=self.device)
        behind = (unit >= slots.count[: self._layouts, None]).int()
        start = (unit * slots.span).expand_as(behind)
        keys = Axis(start, start + slots.span, behind, torch.zeros_like(start), span=slots.span)
        return [Read(0, self.chunk, slots.longest, self._layout(slots, keys))]

    def own(self, slots: CacheLayout) -> BlockLayout | Tensor:
        """How the chunk's tokens see one another: a layout, or where there are few a mask as in CachedKeys."""
        return slots.visible(self.position, self.position) if self.chunk <= MAX_UNTILED_TOKENS else self._layout(slots)

    @property
    def _layouts(self) -> int:
        """Of one pattern: one layout serves sequences of one length."""
        return 1 if len(set(self.lengths)) == 1 else len(self.lengths)

    def _axis(self) -> Axis:
        start = self.position[: self._layouts].int()
        return Axis(start, start + 1, torch.zeros_like(start), torch.zeros_like(start))

    def _layout(self, slots: CacheLayout, keys: Axis | None = None) -> BlockLayout:
        # It is needed once: an axis without a key is not kept.
        pattern = slots.patterns[0] if len(slots.patterns) == 1 else slots.patterns
        return build_layout(pattern, self._axis(), keys, block=self.block)


class FixedStep(Step):
    """A step whose shapes follow from `chunk` (at most MAX_UNTILED_TOKENS) and the reserved room alone. It never waits
    for the device, so that a CUDA graph of it serves any lengths. `lengths` and `new` are int64 `[batch]` on the
    device; the step does not change them."""

    def __init__(self, lengths: Tensor, new: Tensor, chunk: int, rotary: RotaryEmbedding) -> None:
        assert chunk <= MAX_UNTILED_TOKENS, "layouts are not of fixed shapes"
        self.lengths, self.new, self.chunk, self.rotary = lengths, new, chunk, rotary
        self.device = lengths.device
        self.position = lengths[:, None] + torch.arange(chunk, device=self.device)
        self._found = {}

    def units(self, span: int) -> Units:
        before = self.lengths // span
        return Units(before, (self.lengths + self.new) // span - before, (self.chunk + span - 1) // span)

    def longest(self, slots: CacheLayout) -> int:
        return slots.reserved * slots.span

    def read(self, slots: CacheLayout) -> list[Read]:
        return slots.read_fixed(self.position)

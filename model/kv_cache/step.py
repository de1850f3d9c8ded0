"""A step: one chunk of tokens that is read into a cache, with all that does not differ between layers."""

from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernels import Axis, BlockLayout, build_layout
from model.kv_cache.cache_layout import CacheLayout, Read

MAX_UNTILED_TOKENS = 8
"""Chunks of at most this many tokens attend without tiles, as one group (cache_layout.QUERIES_AT_ONCE)."""


class Units(NamedTuple):
    """Per sequence, the number of full units `before` a chunk and the number of `new` ones; on the host, or int64
    `[batch]` on the device. `most`: the largest number of new ones; an upper bound if they are on the device."""

    before: Sequence[int] | Tensor
    new: Sequence[int] | Tensor
    most: int


class Step:
    """One chunk of tokens for every sequence. The layers of one pattern share the results that `once` stores.

    `lengths`: of the sequences before the chunk. `new`: how many tokens of the chunk belong to each sequence; the rest
    is padding. Both are on the host. `position` int64 `[batch, chunk]`: of all tokens, including the padding.
    """

    def __init__(
        self, lengths: Sequence[int], new: Sequence[int], chunk: int, block: int, device: torch.device
    ) -> None:
        self.lengths, self.new, self.chunk, self.block, self.device = list(lengths), list(new), chunk, block, device
        self.position = torch.tensor(self.lengths, device=self.device)[:, None] + torch.arange(
            chunk, device=self.device
        )
        self._found: dict[Hashable, Any] = {}

    def once(self, key: Hashable, find: Callable[[], Any]) -> Any:
        """Returns the result of `find`, which is called for the first layer that uses `key` and then kept."""
        if key not in self._found:
            self._found[key] = find()
        return self._found[key]

    def units(self, span: int) -> Units:
        """The units of `span` tokens that are full before the chunk, and those that it fills."""
        before = [length // span for length in self.lengths]
        after = [(length + new) // span for length, new in zip(self.lengths, self.new, strict=True)]
        new = [b - a for a, b in zip(before, after, strict=True)]
        return Units(before, new, max(new))

    def longest(self, layout: CacheLayout) -> int:
        """Length of the longest sequence after the chunk; in a step of fixed shapes the largest possible length."""
        return max(length + new for length, new in zip(self.lengths, self.new, strict=True))

    def read(self, layout: CacheLayout) -> list[Read]:
        """The cached keys that the tokens of the chunk read."""
        if self.chunk <= MAX_UNTILED_TOKENS or not layout.everything or not layout.longest:
            return layout.read(self.position)
        # Unit i is in slot i. In a ragged batch, slots after the end of a sequence count as another document.
        unit = torch.arange(layout.longest, dtype=torch.int32, device=self.device)
        after_end = (unit >= layout.count[: self._distinct, None]).int()
        start = (unit * layout.span).expand_as(after_end)
        keys = Axis(start, start + layout.span, after_end, torch.zeros_like(start), span=layout.span)
        return [Read(0, self.chunk, layout.longest, self._tile_layout(layout, keys))]

    def own(self, layout: CacheLayout) -> BlockLayout | Tensor:
        """Which tokens of the chunk see each other: a tile layout, or for few tokens a mask as in CachedKeys."""
        return (
            layout.visible(self.position, self.position)
            if self.chunk <= MAX_UNTILED_TOKENS
            else self._tile_layout(layout)
        )

    @property
    def _distinct(self) -> int:
        """Number of different layouts in the batch: sequences of one length share a layout."""
        return 1 if len(set(self.lengths)) == 1 else len(self.lengths)

    def _axis(self) -> Axis:
        start = self.position[: self._distinct].int()
        return Axis(start, start + 1, torch.zeros_like(start), torch.zeros_like(start))

    def _tile_layout(self, layout: CacheLayout, keys: Axis | None = None) -> BlockLayout:
        # The layout is used once. An axis without a key is not cached.
        pattern = layout.patterns[0] if len(layout.patterns) == 1 else layout.patterns
        return build_layout(pattern, self._axis(), keys, block=self.block)


class FixedStep(Step):
    """A step whose shapes depend on `chunk` (at most MAX_UNTILED_TOKENS) and the reserved room alone. It never waits
    for the device, so that one CUDA graph serves all lengths. `lengths` and `new` are int64 `[batch]` on the device;
    the step does not change them."""

    def __init__(self, lengths: Tensor, new: Tensor, chunk: int) -> None:
        assert chunk <= MAX_UNTILED_TOKENS, "layouts are not of fixed shapes"
        self.lengths, self.new, self.chunk = lengths, new, chunk
        self.device = lengths.device
        self.position = lengths[:, None] + torch.arange(chunk, device=self.device)
        self._found = {}

    def units(self, span: int) -> Units:
        before = self.lengths // span
        return Units(before, (self.lengths + self.new) // span - before, (self.chunk + span - 1) // span)

    def longest(self, layout: CacheLayout) -> int:
        return layout.reserved * layout.span

    def read(self, layout: CacheLayout) -> list[Read]:
        return layout.read_fixed(self.position)

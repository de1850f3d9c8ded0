"""A chunk of tokens on its way through the layers: what they share, and how they attend to it and to the past."""

from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernels import Axis, BlockLayout, attention, build_layout, merge
from kernels.decoding.decode_attention import decode_attention
from kernels.layout.cached_keys import CachedKeys
from model.decoding.cache_layout import QUERIES_AT_ONCE, CacheLayout, Read
from model.rope import RotaryEmbedding

MAX_UNTILED_TOKENS = 8
"""Tokens of a chunk up to which it is attended to without tiles; they are one group (slots.QUERIES_AT_ONCE)."""


DECODING = {"reference": "direct", "blocked": "direct", "triton": "triton"}
"""A model's backend -> that of its decoding (kernels.decode_attention); of others, which only know tiles: "auto"."""


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


def attend_to_all(
    q: Tensor, own: CachedKeys, past: Sequence[tuple[Read, CachedKeys]], fresh: Sequence[CachedKeys], backend: str
) -> tuple[Tensor, Tensor]:
    """One softmax over the chunk (`own`, whose mask may be a layout), what the store gives of the `past`, and `fresh`
    keys that the chunk has brought beside its tokens: (out, lse) as kernels.attention. Layouts are for all queries."""
    if isinstance(own.mask, Tensor):
        return attend_to_parts(q, [*(part for _, part in past), *fresh, own], backend)
    return _attend_in_groups(q, [own], past, fresh, backend)


def attend_to_past(
    q: Tensor, past: Sequence[tuple[Read, CachedKeys]], fresh: Sequence[CachedKeys], backend: str
) -> tuple[Tensor, Tensor]:
    """As `attend_to_all`, of keys that stand for no token of the chunk alone; 0 and -inf where there are none."""
    if q.shape[2] <= MAX_UNTILED_TOKENS:
        return attend_to_parts(q, [*(part for _, part in past), *fresh], backend)
    return _attend_in_groups(q, [], past, fresh, backend)


def attend_to_parts(q: Tensor, parts: Sequence[CachedKeys], backend: str) -> tuple[Tensor, Tensor]:
    """One softmax of MAX_UNTILED_TOKENS queries over all `parts`; 0 and -inf where there is none."""
    assert q.shape[2] <= QUERIES_AT_ONCE, "few queries are one group"
    return decode_attention(q, parts, backend=DECODING.get(backend, "auto")) if parts else nothing_seen(q)


def nothing_seen(q: Tensor) -> tuple[Tensor, Tensor]:
    """(out, lse) of queries without a key."""
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return torch.zeros_like(q), torch.full(q.shape[:3], -torch.inf, dtype=dtype, device=q.device)


def _attend_in_groups(
    q: Tensor,
    tiled: list[CachedKeys],
    past: Sequence[tuple[Read, CachedKeys]],
    fresh: Sequence[CachedKeys],
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Many queries: those parts whose masks are layouts by the kernels of training, others group by group."""
    tiled += [part for _, part in past if isinstance(part.mask, BlockLayout)]
    found = [attention(q, *part[:3], return_lse=True, backend=backend) for part in tiled]
    out, lse = merge(found) if found else nothing_seen(q)
    past = [(read, part) for read, part in past if not isinstance(part.mask, BlockLayout)]
    for first in range(0, q.shape[2], QUERIES_AT_ONCE):
        rows = slice(first, first + QUERIES_AT_ONCE)
        parts = [part for read, part in past if read.first == first]
        parts += [part.of(rows) for part in fresh]
        if parts:
            seen = decode_attention(q[:, :, rows], parts, backend="direct")
            merged = merge([seen, (out[:, :, rows], lse[:, :, rows])])
            out[:, :, rows], lse[:, :, rows] = merged
    return out, lse

"""Which keys a pattern can still see, where they are kept, and which of them a query reads.

A query sees the keys within the pattern's horizon (`Pattern.horizon`) and its persistent keys (`Pattern.persistent`).
So a cache has two parts: a ring of slots for the horizon, in which a new key replaces the one that has just left it,
and a list of the persistent keys. A window's cache is a ring of fixed size and its sinks; that of a strided pattern is
a ring and its columns. Under dense attention every key is persistent.

Keys are numbered units: tokens, or the summaries of `span` tokens each. What is said here holds for every layer with
the pattern, whatever its keys and values: it is computed once a step, and layers only move keys and values.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels import BlockLayout
from kernels.patterns import Pattern

QUERIES_AT_ONCE = 128
"""Queries that share one selection of keys: the fewer, the fewer keys are read that only others of them see."""

PAIRS_AT_ONCE = 1 << 22
"""Pairs of a query and a key whose visibility is found out at once."""

ONE_MASK = 1 << 20
"""Pairs up to which a group's mask is kept whole."""


@dataclass(frozen=True, eq=False)
class Read:
    """What the queries `[first, stop)` of a step read. `slots`: int64 `[batch, keys]`, or how many of the first slots,
    where that wastes little. `mask`: booleans `[batch, 1 or kv_heads, stop - first or 1, keys]`, or a layout of as many
    tiles."""

    first: int
    stop: int
    slots: Tensor | int
    mask: Tensor | BlockLayout
    count: Tensor | None = None
    """Integers `[batch]`: keys from here on are room for later ones."""


class CacheLayout:
    """The cache layout of one pattern, or of one pattern per KV head (a key is kept while any head may see it).

    `count` int64 `[batch]`: units kept or forgotten so far, per sequence; unit i stands for the tokens
    `[i * span, (i + 1) * span)`.
    """

    def __init__(self, pattern: Pattern | Sequence[Pattern], batch: int, device: torch.device, span: int = 1) -> None:
        self.patterns = (pattern,) if isinstance(pattern, Pattern) else tuple(pattern)
        self.span, self.device = span, device
        horizons = [pattern.horizon for pattern in self.patterns]
        self.everything = None in horizons
        self.ring = 0 if self.everything else max((horizon - 1) // span for horizon in horizons)
        self.count = torch.zeros(batch, dtype=torch.int64, device=device)
        self.sequence = torch.arange(batch, device=device)[:, None]
        """By which a store is indexed, besides by slots."""
        self.longest = 0
        """The largest count, known without asking the device."""
        self._persistent = torch.zeros(0, dtype=torch.int64, device=device)
        self._sifted = 0
        """Units below this one are in `_persistent`, if they are persistent."""
        self.reserved = 0
        """Units that there is room for, in steps of fixed shapes too."""
        self.needed = self.ring
        """Slots of each sequence: the ring, and one for every persistent key so far, or reserved (`reserve`)."""
        self._most = 0
        """Units that the intervals of any query below hold."""

    @property
    def used(self) -> int:
        """Slots that hold a key of the longest sequence."""
        persistent = self.longest if self.everything else int((self._persistent < self.longest).sum())
        return min(self.ring, self.longest) + persistent

    def reserve(self, units: int, queries: int) -> None:
        """Prepares for `units` of every sequence, and for `read_fixed` by so many queries at once."""
        self.reserved = max(units, self.reserved)
        self._sift(self.reserved)
        if self.everything:
            query = torch.arange(self.reserved * self.span + queries, device=self.device)
            _, ends = self._disjoint(query, query + queries, len(query) + queries + self.span, queries, self.reserved)
            self._most = int(ends[:, -1].max())

    def read_fixed(self, query: Tensor) -> list[Read]:
        """As `read`, in shapes that follow from what is reserved, and without asking the device."""
        if self.everything:
            slots, unit, count = self._intervals(query, self._most, self.reserved)
        else:
            slots, unit = self._ring_and_persistent(self.ring, len(self._persistent) > 0)
            past = (self.count - self.ring).clamp(min=0)
            count = torch.searchsorted(self._persistent, past) if len(self._persistent) else torch.zeros_like(past)
            count = torch.where(count > 0, self.ring + count, self.count.clamp(max=self.ring))
        return [Read(0, query.shape[1], slots, self._live(query, unit), count)] if unit.shape[1] else []

    def read(self, query: Tensor) -> list[Read]:
        """What queries at these positions, int64 `[batch, queries]`, read of the units kept so far: nothing is left out
        that their pattern lets them see, and nothing that it hides is unmasked."""
        reads = []
        for first in range(0, query.shape[1], QUERIES_AT_ONCE):
            if self.longest:
                reads += self._select(first, query[:, first : first + QUERIES_AT_ONCE])
        return reads

    def visible(self, query: Tensor, unit: Tensor) -> Tensor:
        """Booleans `[batch, patterns, queries, units]`, for query int64 `[batch, queries]`, unit int64 `[batch,
        units]`."""
        start = unit[:, None] * self.span
        end, query = start + self.span, query[:, :, None]
        seen = [pattern.visible(query, start, end).expand(*query.shape[:2], unit.shape[1]) for pattern in self.patterns]
        every = torch.stack(seen, 1) if len(seen) > 1 else seen[0][:, None]
        return every & (end <= query + 1)[:, None]

    def write(self, units: int, before: Sequence[int] | Tensor, new: Sequence[int] | Tensor) -> list[Tensor]:
        """Counts the next units as kept and returns their slots: in the ring and, if any key may be persistent, in the
        list; int64 `[batch, units]`, or all slots of one unit as `[batch, slots]`, -1 for none.

        Sequence by sequence: `before`, the units kept so far, and `new`, how many of `units`, the first, are real. On
        the device (int64 `[batch]` both) they must be reserved, and `longest` is the caller's to keep.
        """
        if not isinstance(before, Tensor):
            self.longest = max(kept + more for kept, more in zip(before, new, strict=True))
            self._sift(self.longest)
            new = torch.tensor(new, device=self.device)
        offset = torch.arange(units, device=self.device)
        unit, real = self.count[:, None] + offset, offset < new[:, None]
        self.count += new  # in its place: a CUDA graph reads it there
        if self.everything:
            return [torch.where(real, unit, -1)]
        where = []
        if self.ring:
            # Of more new units than the ring holds, the last ones stay.
            in_ring = real & (unit >= self.count[:, None] - self.ring)
            where.append(torch.where(in_ring, unit % self.ring, -1))
        if len(self._persistent):
            place = torch.searchsorted(self._persistent, unit)
            found = self._persistent[place.clamp(max=len(self._persistent) - 1)] == unit
            where.append(torch.where(real & found, self.ring + place, -1))
        return [torch.cat(where, 1)] if units == 1 and len(where) > 1 else where

    def _sift(self, longest: int) -> None:
        """Lists the persistent units below `longest`."""
        if self.everything:
            self.needed = max(self.needed, self.ring + longest)
        if self.everything or longest <= self._sifted:
            return
        unit = torch.arange(self._sifted, longest, device=self.device)
        lasts = torch.stack([pattern.persistent(unit * self.span) for pattern in self.patterns]).any(0)
        self._persistent, self._sifted = torch.cat([self._persistent, unit[lasts]]), longest
        self.needed = self.ring + len(self._persistent)

    def _select(self, first: int, query: Tensor) -> Iterator[Read]:
        """What one group of queries reads; `first` is its first query's place in the step."""
        slots, unit = self._candidates(query)
        stop, pairs = first + query.shape[1], len(self.patterns) * query.numel()
        if pairs * unit.shape[1] <= ONE_MASK:
            mask = self._live(query, unit)
            index = _pick(mask.any((1, 2)))
            if index is not None:
                yield Read(first, stop, _slots(slots, index), _take(mask, index[:, None, None]))
            return
        # Most keys are seen by all queries of the group or by none, as most tiles of a layout are full or empty. Of the
        # others alone a mask is kept.
        parts = [self._live(query, part) for part in unit.split(max(1, PAIRS_AT_ONCE // pairs), 1)]
        every = torch.cat([part.all(1).all(1) for part in parts], 1)
        some = torch.cat([part.any(1).any(1) for part in parts], 1) & ~every
        for wanted in (every, some):
            index = _pick(wanted)
            if index is not None:
                mask = _take(wanted, index)[:, None, None]
                if wanted is some:
                    mask = mask & self._live(query, _take(unit, index))
                yield Read(first, stop, _slots(slots, index), mask)

    def _live(self, query: Tensor, unit: Tensor) -> Tensor:
        return self.visible(query, unit) & (unit >= 0)[:, None, None]

    def _candidates(self, query: Tensor) -> tuple[Tensor | int, Tensor]:
        """(slots as in Read, the unit in each or -1, int64 `[batch, keys]`): all that the queries may see, and more."""
        if self.everything:
            return self._intervals(query, None, self.longest)[:2]
        beyond = self.longest > self.ring and len(self._persistent) > 0
        return self._ring_and_persistent(min(self.ring, self.longest), beyond)

    def _ring_and_persistent(self, in_ring: int, beyond: bool) -> tuple[int, Tensor]:
        """As `_candidates`: the first slots of the ring, and all `beyond` it."""
        count = self.count[:, None]
        slot = torch.arange(in_ring, device=self.device)
        unit = count - 1 - (count - 1 - slot) % max(self.ring, 1)
        if beyond:
            # What is in the ring as well is read there.
            persistent = torch.where(self._persistent < count - self.ring, self._persistent, -1)
            unit = torch.cat([unit, persistent], 1)
        return unit.shape[1], torch.where(unit >= 0, unit, -1)

    def _intervals(self, query: Tensor, most: int | None, total: int) -> tuple[Tensor | int, Tensor, Tensor]:
        """As `_candidates`, where unit i is in slot i: what the patterns name, instead of all that there is, `total`;
        and how many of them, int64 `[batch]`. `most`: of them; None: the device is asked."""
        length = total * self.span + query.shape[1] + self.span
        low, ends = self._disjoint(query[:, 0], query[:, -1] + 1, length, query.shape[1], self.count[:, None])
        most = int(ends[:, -1].max()) if most is None else most
        if 2 * most >= total:
            unit = torch.arange(total, device=self.device).expand(len(query), -1)
            return total, torch.where(unit < self.count[:, None], unit, -1), self.count
        entry = torch.arange(most, device=self.device).repeat(len(query), 1)
        run = torch.searchsorted(ends, entry, right=True).clamp(max=ends.shape[1] - 1)
        unit = low.gather(1, run) + entry - F.pad(ends, (1, 0))[:, :-1].gather(1, run)
        live = entry < ends[:, -1:]
        return torch.where(live, unit, 0), torch.where(live, unit, -1), ends[:, -1]

    def _disjoint(
        self, start: Tensor, stop: Tensor, length: int, queries: int, limit: Tensor | int
    ) -> tuple[Tensor, Tensor]:
        """The intervals of units below `limit` that the patterns name for queries `[start, stop)`, in order: where each
        begins, and how many units they hold up to its end, int64 `[groups, intervals]`."""
        found = [pattern.candidates(start, stop, length, queries) for pattern in self.patterns]
        low, high = (torch.cat([pair[side] for pair in found], -1) for side in (0, 1))
        low = (low // self.span).clamp(min=0)
        high = (-(-high // self.span)).clamp(max=limit)
        # Disjoint, in order: each begins where those before it have ended.
        low, order = low.sort(-1)
        high = high.gather(-1, order)
        low = torch.maximum(low, F.pad(high.cummax(-1).values[:, :-1], (1, 0)))
        return low, (high - low).clamp(min=0).cumsum(-1)


def _pick(wanted: Tensor) -> Tensor | None:
    """Which of the candidates to read, where booleans `[batch, keys]` say which are wanted: int64 `[batch, keys]`, of
    no keys where that means all of them because half are wanted. None: none is."""
    most = int(wanted.sum(1).max())
    if not most:
        return None
    return wanted.int().argsort(dim=1, descending=True, stable=True)[:, : most if 2 * most < wanted.shape[1] else 0]


def _take(x: Tensor, index: Tensor) -> Tensor:
    """`x` `[..., keys]` at an index of `_pick`, expanded to x's dimensions."""
    return x.gather(-1, index.expand(*x.shape[:-1], -1)) if index.shape[-1] else x


def _slots(slots: Tensor | int, index: Tensor) -> Tensor | int:
    if not index.shape[1]:
        return slots
    return index if isinstance(slots, int) else slots.gather(1, index)

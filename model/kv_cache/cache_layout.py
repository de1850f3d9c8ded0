"""Which keys a pattern can still see, where they are kept, and which of them a query reads.

A query sees the keys within the pattern's horizon (`Pattern.horizon`) and its persistent keys (`Pattern.persistent`).
A cache therefore has two parts: a ring of slots for the horizon, in which each new key replaces the key that has just
left the horizon, and a list of the persistent keys. The cache of a window is a ring of fixed size and the sink tokens;
that of a strided pattern is a ring and the columns. Under dense attention every key is persistent.

Keys are numbered units: tokens, or summaries of `span` tokens each. A slot is the place of one unit in a store. The
layout of a cache depends on the pattern and on the lengths of the sequences alone, so it is computed once a step for
all layers of the pattern; each layer then only moves its keys and values.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels import BlockLayout
from kernels.patterns import Pattern

QUERIES_AT_ONCE = 128
"""Size of a group of queries that read the same keys. Smaller groups read fewer keys that only other queries see."""

PAIRS_AT_ONCE = 1 << 22
"""Number of (query, key) pairs whose visibility is computed at once."""

ONE_MASK = 1 << 20
"""Largest number of (query, key) pairs of a group whose mask is kept in one tensor."""


@dataclass(frozen=True, eq=False)
class Read:
    """The keys that the queries `[first, stop)` of a step read.

    `slots`: int64 `[batch, keys]`; or an int n for the first n slots, if that wastes little. `mask`: booleans
    `[batch, 1 or kv_heads, stop - first or 1, keys]`, or the equivalent tile layout.
    """

    first: int
    stop: int
    slots: Tensor | int
    mask: Tensor | BlockLayout
    count: Tensor | None = None
    """Integers `[batch]`: how many of the keys are in use; the others are reserved for later tokens."""


class CacheLayout:
    """The cache layout of one pattern, or of one pattern per KV head (a key is kept while any head may see it).

    `count` int64 `[batch]`: the number of units written so far, per sequence, including those no longer kept. Unit i
    stands for the tokens `[i * span, (i + 1) * span)`.
    """

    def __init__(self, pattern: Pattern | Sequence[Pattern], batch: int, device: torch.device, span: int = 1) -> None:
        self.patterns = (pattern,) if isinstance(pattern, Pattern) else tuple(pattern)
        self.span, self.device = span, device
        horizons = [pattern.horizon for pattern in self.patterns]
        self.everything = None in horizons
        self.ring = 0 if self.everything else max((horizon - 1) // span for horizon in horizons)
        self.count = torch.zeros(batch, dtype=torch.int64, device=device)
        self.sequence = torch.arange(batch, device=device)[:, None]
        """Index of each sequence, int64 `[batch, 1]`; a store is indexed by it and by slots."""
        self.longest = 0
        """The largest `count`, on the host: reading it needs no synchronization with the device."""
        self._persistent = torch.zeros(0, dtype=torch.int64, device=device)
        self._listed = 0
        """`_persistent` lists the persistent units below this one."""
        self.reserved = 0
        """Number of units for which room is reserved (`reserve`); steps of fixed shapes need it."""
        self.needed = self.ring
        """Number of slots per sequence: the ring, and one per persistent key, written or reserved."""
        self._most = 0
        """Largest number of units in the key intervals of a query, over all reserved positions."""

    @property
    def used(self) -> int:
        """Number of slots that hold a key of the longest sequence."""
        persistent = self.longest if self.everything else int((self._persistent < self.longest).sum())
        return min(self.ring, self.longest) + persistent

    def reserve(self, units: int, queries: int) -> None:
        """Reserves room for `units` of every sequence, and prepares `read_fixed` for `queries` queries per step."""
        self.reserved = max(units, self.reserved)
        self._list_persistent(self.reserved)
        if self.everything:
            query = torch.arange(self.reserved * self.span + queries, device=self.device)
            _, ends = self._disjoint(query, query + queries, len(query) + queries + self.span, queries, self.reserved)
            self._most = int(ends[:, -1].max())

    def read_fixed(self, query: Tensor) -> list[Read]:
        """As `read`, with shapes that depend on the reserved room alone, and without synchronizing with the device."""
        if self.everything:
            slots, unit, count = self._intervals(query, self._most, self.reserved)
        else:
            slots, unit = self._ring_and_persistent(self.ring, len(self._persistent) > 0)
            past = (self.count - self.ring).clamp(min=0)
            count = torch.searchsorted(self._persistent, past) if len(self._persistent) else torch.zeros_like(past)
            count = torch.where(count > 0, self.ring + count, self.count.clamp(max=self.ring))
        return [Read(0, query.shape[1], slots, self._live(query, unit), count)] if unit.shape[1] else []

    def read(self, query: Tensor) -> list[Read]:
        """The units kept so far that queries at the positions `query`, int64 `[batch, queries]`, read: all that their
        pattern makes visible; the mask of each Read hides all others."""
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
        """Adds the next units to `count` and returns their slots.

        Returns one tensor for the ring and, if there are persistent keys, one for their list: int64 `[batch, units]`,
        -1 for a unit that is not stored there. If `units` is 1, it returns both joined: `[batch, slots]`.

        `before`: the units written so far, per sequence. `new`: how many of the next `units`, counted from the first,
        belong to the sequence; the others are padding. If both are tensors on the device, int64 `[batch]`, room must be
        reserved, and the caller updates `longest`.
        """
        if not isinstance(before, Tensor):
            self.longest = max(kept + more for kept, more in zip(before, new, strict=True))
            self._list_persistent(self.longest)
            new = torch.tensor(new, device=self.device)
        offset = torch.arange(units, device=self.device)
        unit, real = self.count[:, None] + offset, offset < new[:, None]
        self.count += new  # in place: a CUDA graph reads this tensor
        if self.everything:
            return [torch.where(real, unit, -1)]
        where = []
        if self.ring:
            # If there are more new units than the ring holds, the last ones are kept.
            in_ring = real & (unit >= self.count[:, None] - self.ring)
            where.append(torch.where(in_ring, unit % self.ring, -1))
        if len(self._persistent):
            place = torch.searchsorted(self._persistent, unit)
            found = self._persistent[place.clamp(max=len(self._persistent) - 1)] == unit
            where.append(torch.where(real & found, self.ring + place, -1))
        return [torch.cat(where, 1)] if units == 1 and len(where) > 1 else where

    def _list_persistent(self, longest: int) -> None:
        """Adds the persistent units below `longest` to `_persistent`."""
        if self.everything:
            self.needed = max(self.needed, self.ring + longest)
        if self.everything or longest <= self._listed:
            return
        unit = torch.arange(self._listed, longest, device=self.device)
        persistent = torch.stack([pattern.persistent(unit * self.span) for pattern in self.patterns]).any(0)
        self._persistent, self._listed = torch.cat([self._persistent, unit[persistent]]), longest
        self.needed = self.ring + len(self._persistent)

    def _select(self, first: int, query: Tensor) -> Iterator[Read]:
        """The reads of one group of queries; `first`: the index of its first query in the step."""
        slots, unit = self._candidates(query)
        stop, pairs = first + query.shape[1], len(self.patterns) * query.numel()
        if pairs * unit.shape[1] <= ONE_MASK:
            mask = self._live(query, unit)
            index = _pick(mask.any((1, 2)))
            if index is not None:
                yield Read(first, stop, _slots(slots, index), _take(mask, index[:, None, None]))
            return
        # Most keys are seen by all queries of the group or by none, like full and empty tiles of a layout. Only the
        # other keys get a mask per query.
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
        """(slots as in Read, int64 `[batch, keys]`: the unit in each or -1) for a superset of the visible units."""
        if self.everything:
            return self._intervals(query, None, self.longest)[:2]
        beyond = self.longest > self.ring and len(self._persistent) > 0
        return self._ring_and_persistent(min(self.ring, self.longest), beyond)

    def _ring_and_persistent(self, in_ring: int, beyond: bool) -> tuple[int, Tensor]:
        """As `_candidates`: the first `in_ring` slots of the ring and, with `beyond`, all slots of the list."""
        count = self.count[:, None]
        slot = torch.arange(in_ring, device=self.device)
        unit = count - 1 - (count - 1 - slot) % max(self.ring, 1)
        if beyond:
            # A persistent unit that is also in the ring is read from the ring.
            persistent = torch.where(self._persistent < count - self.ring, self._persistent, -1)
            unit = torch.cat([unit, persistent], 1)
        return unit.shape[1], torch.where(unit >= 0, unit, -1)

    def _intervals(self, query: Tensor, most: int | None, total: int) -> tuple[Tensor | int, Tensor, Tensor]:
        """As `_candidates`, if unit i is in slot i: the units in the patterns' candidate intervals, out of `total`; and
        their number, int64 `[batch]`. `most`: the largest number; None: it is read from the device."""
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
        """The patterns' candidate intervals of units below `limit` for queries `[start, stop)`, sorted and disjoint.
        Returns the first unit of each, and the number of units up to the end of each, int64 `[groups, intervals]`."""
        found = [pattern.candidates(start, stop, length, queries) for pattern in self.patterns]
        low, high = (torch.cat([pair[side] for pair in found], -1) for side in (0, 1))
        low = (low // self.span).clamp(min=0)
        high = (-(-high // self.span)).clamp(max=limit)
        # Sort the intervals, and let each begin no earlier than the end of those before it.
        low, order = low.sort(-1)
        high = high.gather(-1, order)
        low = torch.maximum(low, F.pad(high.cummax(-1).values[:, :-1], (1, 0)))
        return low, (high - low).clamp(min=0).cumsum(-1)


def _pick(wanted: Tensor) -> Tensor | None:
    """Indices of the candidates to read, int64 `[batch, keys]`, for booleans `wanted` `[batch, keys]`. An index without
    keys stands for all candidates, if at least half of them are wanted. None: none is wanted."""
    most = int(wanted.sum(1).max())
    if not most:
        return None
    return wanted.int().argsort(dim=1, descending=True, stable=True)[:, : most if 2 * most < wanted.shape[1] else 0]


def _take(x: Tensor, index: Tensor) -> Tensor:
    """Returns `x` `[..., keys]` at an index that `_pick` returned, expanded to the dimensions of `x`."""
    return x.gather(-1, index.expand(*x.shape[:-1], -1)) if index.shape[-1] else x


def _slots(slots: Tensor | int, index: Tensor) -> Tensor | int:
    if not index.shape[1]:
        return slots
    return index if isinstance(slots, int) else slots.gather(1, index)

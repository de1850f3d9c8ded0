"""Best-fit decreasing, a heuristic for bin packing: it puts items into few bins of equal capacity.

Items are placed in order of decreasing size. Each goes into the bin that has the least free room among those in which
it fits, or opens a new bin. Source: Ding et al., "Fewer Truncations Improve Language Modeling", 2024, where items are
documents and bins are training sequences.
"""

import numpy as np

BITS = 10
"""A word of the bitmap of rooms has 2**BITS bits."""


def best_fit_decreasing(sizes: np.ndarray, capacity: int, groups: np.ndarray) -> np.ndarray:
    """Returns the bin of each item as int64 `[items]`. Bins are numbered from 0 in the order in which they are opened.

    Items of equal size are placed in the order in which they are given. Consecutive items of equal size and group are
    placed in different bins. An item takes a few microseconds.

    sizes: integers `[items]` from 1 to `capacity`.
    groups: integers `[items]`; copies of one document are a group.
    """
    order = np.argsort(-sizes, kind="stable")
    bins, opened = [], 0
    rooms = _Rooms(capacity)
    filled: list[tuple[int, int]] = []  # (room, bin) of the bins that got an item of this group
    last = None
    for size, group in zip(sizes[order].tolist(), groups[order].tolist(), strict=True):
        if group != last:
            for room, number in filled:
                rooms.add(room, number)
            filled, last = [], group
        room = rooms.at_least(size)
        if room is None:
            room, number, opened = capacity, opened, opened + 1
        else:
            number = rooms.take(room)
        bins.append(number)
        if room > size:
            filled.append((room - size, number))
    found = np.empty(len(sizes), np.int64)
    found[order] = bins
    return found


class _Rooms:
    """The open bins by their free room, as a bitmap of two levels.

    A bit of `words` is set if some bin has that room, and a bit of `summary` if that word is not zero. So the least
    room that is large enough is found in two steps.
    """

    def __init__(self, capacity: int):
        self.bins: dict[int, list[int]] = {}
        self.words = [0] * ((capacity >> BITS) + 1)
        self.summary = 0

    def at_least(self, size: int) -> int | None:
        """Returns the least room of at least `size` that a bin has; None if no bin has."""
        word, bit = size >> BITS, size & ((1 << BITS) - 1)
        if above := self.words[word] >> bit:
            return size + _lowest(above)
        words = self.summary >> (word + 1)
        if not words:
            return None
        word += 1 + _lowest(words)
        return (word << BITS) + _lowest(self.words[word])

    def take(self, room: int) -> int:
        """Returns a bin with that room, the last one that was added, and removes it."""
        bins = self.bins[room]
        number = bins.pop()
        if not bins:
            word = room >> BITS
            self.words[word] ^= 1 << (room & ((1 << BITS) - 1))
            if not self.words[word]:
                self.summary ^= 1 << word
        return number

    def add(self, room: int, number: int) -> None:
        self.bins.setdefault(room, []).append(number)
        word = room >> BITS
        self.words[word] |= 1 << (room & ((1 << BITS) - 1))
        self.summary |= 1 << word


def _lowest(bits: int) -> int:
    """Returns the index of the lowest bit that is set."""
    return (bits & -bits).bit_length() - 1

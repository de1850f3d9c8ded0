"""Which tokens of a sequence each rank holds, and which ones its queries may see: lists of ranges of token indices."""

import functools
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from kernels.patterns import Pattern

Ranges = tuple[range, ...]
"""Rising ranges of indices that do not overlap. A tensor of a rank holds them one after the other."""


def contiguous(length: int, ranks: int) -> tuple[Ranges, ...]:
    """The tokens of each rank: `ranks` equal parts of the sequence, in order."""
    return tuple((part,) for part in _equal_parts(length, ranks))


def interleaved(length: int, ranks: int) -> tuple[Ranges, ...]:
    """The tokens of each rank: of 2 x `ranks` equal parts, rank r holds part r and part r from the end.

    Under causal attention over the whole past, the first part of a rank has few visible pairs and the second part many:
    each rank computes the same number of them.
    """
    parts = _equal_parts(length, 2 * ranks)
    return tuple((parts[rank], parts[-1 - rank]) for rank in range(ranks))


def size(ranges: Ranges) -> int:
    """Indices in all ranges."""
    return sum(map(len, ranges))


def take(x: Tensor, ranges: Ranges, dim: int = 1) -> Tensor:
    """The entries of `x` at `ranges` along `dim`, one range after the other; a view where there is one range."""
    parts = [x.narrow(dim, each.start, len(each)) for each in ranges]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def extended(ranges: Ranges, before: int, after: int, length: int) -> Ranges:
    """`ranges`, each with `before` and `after` more indices within a sequence of `length`, overlaps joined."""
    return _joined(range(max(0, each.start - before), min(length, each.stop + after)) for each in ranges)


def reach(patterns: Pattern | Sequence[Pattern], length: int) -> int | None:
    """How many tokens back any query of a sequence of `length` sees, itself not counted; None: as far as the document
    goes, because there is no horizon or a key within the length is visible from beyond it."""
    patterns = (patterns,) if isinstance(patterns, Pattern) else tuple(patterns)
    reaches = [_reach(pattern, length) for pattern in patterns]
    return None if None in reaches else max(reaches)


@functools.lru_cache
def _reach(pattern: Pattern, length: int) -> int | None:
    horizon = pattern.horizon
    if horizon is None or horizon > length or pattern.persistent(torch.arange(length)).any():
        return None
    return horizon - 1


def _equal_parts(length: int, count: int) -> list[range]:
    assert length % count == 0, "parts of one size"
    step = length // count
    return [range(first, first + step) for first in range(0, length, step)]


def _joined(ranges: Iterable[range]) -> Ranges:
    joined: list[range] = []
    for each in ranges:
        if joined and each.start <= joined[-1].stop:
            joined[-1] = range(joined[-1].start, max(joined[-1].stop, each.stop))
        else:
            joined.append(each)
    return tuple(joined)

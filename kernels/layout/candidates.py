"""Lists the tiles that may hold a visible pair: step 1 of the layout builder (builder.py).

For each block of queries, `Pattern.candidates` returns intervals of key positions. These become intervals of key
indices, then runs of key blocks, without overlaps. The runs are expanded to tiles in one of two ways: exactly, for
which the host reads their number from the device; or into a list of fixed size, an upper bound for the pattern.
"""

import torch
from torch import Tensor

from kernels.layout.axis import Axis
from kernels.layout.lru_cache import LRUCache
from kernels.patterns.base import Pattern


class BlockedAxis:
    """An axis divided into blocks; the last one is padded with entries of document -1."""

    def __init__(self, axis: Axis, block: int) -> None:
        self.axis, self.block = axis, block
        self.count = -(-axis.length // block)
        padding = self.count * block - axis.length
        to_blocks = lambda t, value: torch.nn.functional.pad(t, (0, padding), value=value).view(axis.batch, -1, block)  # noqa: E731
        self.start, self.end, self.origin = to_blocks(axis.start, 0), to_blocks(axis.end, 0), to_blocks(axis.origin, 0)
        self.document = to_blocks(axis.document, -1)


def candidate_tiles(pattern: Pattern, queries: BlockedAxis, keys: BlockedAxis) -> tuple[Tensor, Tensor, Tensor]:
    """(batch, row, column), int64 `[tiles]` each and without repeats, of every tile that may hold a visible pair."""
    first, size = _candidate_runs(pattern, queries, keys)
    # One entry per tile: run `i` has the entries from ends[i - 1] to ends[i].
    ends = size.flatten().cumsum(0)
    entry = torch.arange(int(ends[-1]), device=ends.device)
    run = torch.searchsorted(ends, entry, right=True)
    column = first.flatten()[run] + entry - (ends - size.flatten())[run]
    row = run // size.shape[-1]
    return row // queries.count, row % queries.count, column


def candidate_tiles_fixed(
    pattern: Pattern, queries: BlockedAxis, keys: BlockedAxis
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The same tiles in a list whose size follows from shapes and settings, so that the host never waits for the
    device.

    Returns (batch, row, column, live, overflow): int64 `[entries]`; live, bool `[entries]`, is False for unused
    entries; overflow, bool `[]`, is True if a row has more tiles than entries, which `row_capacity` should exclude.
    """
    first, size = _candidate_runs(pattern, queries, keys)
    ends = size.cumsum(-1)
    total = ends[..., -1]
    capacity, row, index = _fixed_entries(pattern, queries, keys)
    batch = torch.arange(len(total), device=row.device)[:, None].expand(-1, len(row)).flatten()
    row, index = row.repeat(len(total)), index.repeat(len(total))
    # Offset the run ends of each row so that they rise over all rows: one search finds the run of every entry.
    flat_row, stretch = batch * queries.count + row, keys.count + 1
    flat_rows = torch.arange(total.numel(), device=row.device)[:, None]
    run = torch.searchsorted(
        (flat_rows * stretch + ends.flatten(0, 1)).flatten(), flat_row * stretch + index, right=True
    )
    run = run.clamp(max=size.numel() - 1)
    column = first.flatten()[run] + index - (ends - size).flatten()[run]
    live = index < total.flatten()[flat_row]
    return batch, row, torch.where(live, column, 0), live, (total > capacity).any()


def row_capacity(pattern: Pattern, queries: BlockedAxis, keys: BlockedAxis) -> Tensor:
    """int64 `[rows]`: an upper bound of each row's candidate tiles, for every packing of documents.

    The document of a row's first token may have begun at any earlier token. If the row begins at sequence index i, that
    token's position in its document is therefore between 0 and i, and the bound is the largest need at these positions.
    (Where the pattern counts positions from the beginning of the sequence, it is the need at i.) n consecutive tokens
    overlap at most ceil((n - 1) / block) + 1 blocks. Documents that begin inside the row add the blocks of the row's
    own tokens.
    """
    block, span = queries.block, keys.axis.span
    limit = _limit(queries.axis, keys.axis)
    blocks_of = lambda keys_met: (keys_met + 2 * block - 2) // block  # noqa: E731
    need = []
    for positions in torch.arange(limit, device=queries.axis.device).split(1 << 12):
        stop = (positions + block).clamp(max=limit)
        lower, upper = pattern.candidates(positions, stop, limit, block)
        met = torch.minimum(upper, stop[:, None]) - lower.clamp(min=0)
        keys_met = met // span + 2 if span > 1 else met
        need.append(torch.where(met > 0, blocks_of(keys_met), 0).sum(-1))
    need = torch.cat(need)
    if pattern.anchor == "document":
        need = need.cummax(0).values
    first = queries.axis.first_of_block(block)
    own = 1 if keys.axis is queries.axis else blocks_of(block // span + 2 if span > 1 else block)
    whole = keys.axis is queries.axis and queries.axis.ranges is None
    most = first // block + 1 if whole else torch.full_like(first, keys.count)
    return torch.minimum(need[first.clamp(max=limit - 1)] + own, most)


_cache: LRUCache[tuple[Tensor, Tensor, Tensor]] = LRUCache(size=64)


def _fixed_entries(pattern: Pattern, queries: BlockedAxis, keys: BlockedAxis) -> tuple[Tensor, Tensor, Tensor]:
    """`row_capacity`, and the row and index within the row of every entry of one sequence; cached."""
    axes = (queries.axis, keys.axis)

    def make() -> tuple[Tensor, Tensor, Tensor]:
        capacity = row_capacity(pattern, queries, keys)
        row = torch.repeat_interleave(torch.arange(queries.count, device=capacity.device), capacity)
        index = torch.arange(len(row), device=row.device) - (capacity.cumsum(0) - capacity)[row]
        return capacity, row, index

    key = pattern, queries.block, *((a.length, a.limit, a.span, a.ranges, a.device) for a in axes), axes[0] is axes[1]
    return _cache.get(key, make)


def _limit(queries: Axis, keys: Axis) -> int:
    """Exclusive upper bound of the positions of both axes, within documents and within the sequence."""
    return max(a.limit if a.limit is not None else int((a.end + a.origin).max()) for a in (queries, keys))


def _candidate_runs(pattern: Pattern, queries: BlockedAxis, keys: BlockedAxis) -> tuple[Tensor, Tensor]:
    """(first, size), int64 `[batch, rows, runs]`: disjoint runs of key blocks in ascending order; sizes may be 0."""
    length = _limit(queries.axis, keys.axis)
    find = _KeyIndex(keys.axis, length)

    # The row's first document may have begun before the row: the pattern gives the key intervals.
    document = queries.document
    first_document = document[..., :1]
    in_first = (document == first_document) & (document >= 0)
    start = queries.start[..., 0].long()
    stop = torch.where(in_first, queries.end, 0).amax(-1).long()
    origin = queries.origin[..., 0].long() if pattern.anchor == "sequence" else torch.zeros_like(start)
    lower, upper = pattern.candidates(start + origin, stop + origin, length, queries.block)
    lower = (lower - origin[..., None]).clamp(min=0)
    upper = torch.minimum(upper - origin[..., None], stop[..., None])
    upper = torch.where(upper > lower, upper, lower)
    begin = find.first_ending_after(first_document.long().expand_as(lower), lower)
    end = find.first_starting_at(first_document.long().expand_as(upper), upper)
    end = torch.where(upper > lower, end, begin)

    # Documents that begin inside the row see keys from their own start to the row's last query: one run.
    live = document >= 0
    later = live & ~in_first
    last = live.sum(-1, keepdim=True) - 1  # never -1: a row holds at least one query
    second = torch.where(later, document, document.amax(-1, keepdim=True)).amin(-1, keepdim=True).long()
    rest_begin = find.first_ending_after(second, torch.zeros_like(second))
    rest_end = find.first_starting_at(document.gather(-1, last).long(), queries.end.gather(-1, last).long())
    rest_end = torch.where(later.any(-1, keepdim=True), rest_end, rest_begin)

    first_block = torch.cat([begin, rest_begin], -1) // keys.block
    stop_block = -(-torch.cat([end, rest_end], -1) // keys.block)
    stop_block = torch.where(torch.cat([end > begin, rest_end > rest_begin], -1), stop_block, first_block)

    # Sort the runs and start each where the earlier ones end, so that they do not overlap.
    first_block, order = first_block.sort(-1)
    stop_block = stop_block.gather(-1, order)
    reached = torch.nn.functional.pad(stop_block.cummax(-1).values[..., :-1], (1, 0))
    first_block = torch.maximum(first_block, reached)
    return first_block, (stop_block - first_block).clamp(min=0)


class _KeyIndex:
    """Binary search for keys by (document, position), which rise along the axis."""

    def __init__(self, axis: Axis, length: int) -> None:
        self.length = length + 1
        base = axis.document.long() * self.length
        self.ends, self.starts = (base + axis.end).contiguous(), (base + axis.start).contiguous()

    def first_ending_after(self, document: Tensor, position: Tensor) -> Tensor:
        return self._search(self.ends, document, position, right=True)

    def first_starting_at(self, document: Tensor, position: Tensor) -> Tensor:
        return self._search(self.starts, document, position, right=False)

    def _search(self, sorted_keys: Tensor, document: Tensor, position: Tensor, right: bool) -> Tensor:
        wanted = document * self.length + position
        batch = max(len(sorted_keys), len(wanted))
        wanted = wanted.expand(batch, *wanted.shape[1:])
        found = torch.searchsorted(
            sorted_keys.expand(batch, -1).contiguous(), wanted.flatten(1).contiguous(), right=right
        )
        return found.view_as(wanted)

"""A pattern over concrete axes becomes a layout (kernels/layout.py).

The way from one to the other:

1. For each block of queries, the pattern names key intervals that may hold a visible key (`Pattern.candidates`).
   Positions within documents become key indices, intervals become runs of key blocks, overlaps are removed. This gives
   the candidate tiles.
2. The element-wise truth (`Pattern.visible`, same document, not in the future) is evaluated on those tiles alone, in
   chunks. Tiles without a visible pair are dropped; fully visible ones need no mask; the others get a mask of bits.
3. Tiles are listed by rows (for the forward pass and dQ) and, transposed, by columns (for dK and dV).

Time and memory are proportional to the candidate tiles, never to the square of the length. Nothing here loops over
rows in Python or asks the device for a value, except for the number of tiles.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kernels.axis import Axis
from kernels.layout import BLOCKS, FULL, BlockLayout, TileList
from kernels.patterns.base import Pattern


def build_layout(
    pattern: Pattern | Sequence[Pattern], queries: Axis, keys: Axis | None = None, block: int = 128
) -> BlockLayout:
    """The layout of `pattern`, or of one pattern per KV head. `keys=None`: the queries attend to themselves.

    Layouts of axes without packed documents are cached by their settings. Raises ValueError for a block that is not
    one of BLOCKS, an empty list of patterns, or axes of different batch or device.
    """
    keys = queries if keys is None else keys
    patterns = (pattern,) if isinstance(pattern, Pattern) else tuple(pattern)
    if block not in BLOCKS:
        raise ValueError(f"block={block}: must be one of {', '.join(map(str, BLOCKS))}")
    if not patterns:
        raise ValueError("pattern=[]: must be a pattern, or one pattern per KV head")
    if queries.device != keys.device:
        raise ValueError(f"queries on {queries.device}, keys on {keys.device}: must be on one device")
    if queries.batch != keys.batch and 1 not in (queries.batch, keys.batch):
        raise ValueError(f"queries of batch {queries.batch}, keys of batch {keys.batch}: must agree, or be 1")
    if queries.key is None or keys.key is None:
        return _build(patterns, queries, keys, block)
    return _cache.get(
        (patterns, queries.key, keys.key, block, queries.device), lambda: _build(patterns, queries, keys, block)
    )


class _LayoutCache:
    """The most recently used layouts; a sweep over lengths must not keep them all."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.layouts: OrderedDict[tuple, BlockLayout] = OrderedDict()

    def get(self, key: tuple, build: Callable[[], BlockLayout]) -> BlockLayout:
        if key not in self.layouts:
            self.layouts[key] = build()
            if len(self.layouts) > self.size:
                self.layouts.popitem(last=False)
        self.layouts.move_to_end(key)
        return self.layouts[key]


_cache = _LayoutCache(size=64)


def _build(patterns: tuple[Pattern, ...], queries: Axis, keys: Axis, block: int) -> BlockLayout:
    distinct = list(dict.fromkeys(patterns))
    query_blocks, key_blocks = _Blocks(queries, block), _Blocks(keys, block)
    found = [_find_tiles(p, query_blocks, key_blocks) for p in distinct]

    # One mask table for all; heads with the same pattern share its entries.
    sizes = [0, *np.cumsum([len(t.masks) for t in found]).tolist()]
    tile = torch.cat([torch.where(t.tile == FULL, FULL, t.tile + n) for t, n in zip(found, sizes, strict=False)])
    masks, remap = _unique_masks(torch.cat([t.masks for t in found]))
    tile = torch.where(tile == FULL, FULL, remap[tile])
    head = torch.cat([torch.full_like(t.batch, i) for i, t in enumerate(found)])
    batch, row, column = (torch.cat([getattr(t, name) for t in found]) for name in ("batch", "row", "column"))

    head_of = [distinct.index(p) for p in patterns] if len(distinct) > 1 else [0]
    shape = (max(queries.batch, keys.batch), len(distinct))
    group = batch * len(distinct) + head
    return BlockLayout(
        queries=queries.length,
        keys=keys.length,
        block=block,
        rows=_list_tiles(group, row, column, tile, (*shape, query_blocks.count), head_of),
        columns=_list_tiles(group, column, row, tile, (*shape, key_blocks.count), head_of),
        masks=masks,
        pairs=torch.stack([t.pairs for t in found], 1)[:, head_of],
    )


@dataclass(frozen=True, eq=False)
class _Tiles:
    """Tiles with at least one visible pair, in no particular order."""

    batch: Tensor  # int64 [tiles]
    row: Tensor
    column: Tensor
    tile: Tensor  # int64 [tiles]: FULL or an index into masks
    masks: Tensor  # int32 [partial tiles, block, block // 32]
    pairs: Tensor  # int64 [batch]


class _Blocks:
    """An axis cut in blocks, padded to whole ones; a padding index belongs to no document."""

    def __init__(self, axis: Axis, block: int) -> None:
        self.axis, self.block = axis, block
        self.count = -(-axis.length // block)
        padding = self.count * block - axis.length
        cut = lambda t, value: torch.nn.functional.pad(t, (0, padding), value=value).view(axis.batch, -1, block)  # noqa: E731
        self.start, self.end, self.origin = cut(axis.start, 0), cut(axis.end, 0), cut(axis.origin, 0)
        self.document = cut(axis.document, -1)


def _find_tiles(pattern: Pattern, queries: _Blocks, keys: _Blocks) -> _Tiles:
    """Steps 1 and 2 of the module's docstring, for one pattern."""
    batch, row, column = _candidate_tiles(pattern, queries, keys)
    block, axis_batch = queries.block, max(queries.axis.batch, keys.axis.batch)
    tile = torch.full_like(batch, FULL)
    pairs = torch.zeros(axis_batch, dtype=torch.int64, device=batch.device)
    kept, masks = torch.zeros_like(batch, dtype=torch.bool), []
    # Chunks that stay in a CPU's cache, or that fill a GPU.
    chunk = max(1, (1 << 19 if batch.device.type == "cpu" else 1 << 26) // block**2)
    partial_tiles = 0
    for first in range(0, len(batch), chunk):
        part = slice(first, first + chunk)
        visible = _visible(pattern, queries, keys, batch[part], row[part], column[part])
        count = visible.sum((1, 2))
        pairs.index_add_(0, batch[part], count)
        partial = (count > 0) & (count < block**2)
        kept[part] = count > 0
        packed, index = _unique_masks(_pack(visible[partial]))
        tile[part][partial] = index + partial_tiles
        partial_tiles += len(packed)
        masks.append(packed)
    masks = (
        torch.cat(masks) if masks else torch.zeros(0, block, -(-block // 32), dtype=torch.int32, device=batch.device)
    )
    return _Tiles(batch[kept], row[kept], column[kept], tile[kept], masks, pairs)


def _visible(pattern: Pattern, queries: _Blocks, keys: _Blocks, batch: Tensor, row: Tensor, column: Tensor) -> Tensor:
    """The truth, element by element, on the tiles given: booleans `[tiles, block, block]`."""
    q = (batch.clamp(max=queries.axis.batch - 1), row)
    k = (batch.clamp(max=keys.axis.batch - 1), column)
    query, key_start, key_end = queries.start[q][:, :, None], keys.start[k][:, None, :], keys.end[k][:, None, :]
    document = queries.document[q][:, :, None]
    seen = (document == keys.document[k][:, None, :]) & (document >= 0) & (key_end <= query + 1)
    if pattern.anchor == "sequence":
        query_origin, key_origin = queries.origin[q][:, :, None], keys.origin[k][:, None, :]
        query, key_start, key_end = query + query_origin, key_start + key_origin, key_end + key_origin
    return seen & pattern.visible(query, key_start, key_end)


def _candidate_tiles(pattern: Pattern, queries: _Blocks, keys: _Blocks) -> tuple[Tensor, Tensor, Tensor]:
    """(batch, row, column), int64 `[tiles]` each and without repeats, of every tile that may hold a visible pair."""
    # Beyond every position of either axis, from whichever origin it is counted.
    length = int(torch.stack([(axis.end + axis.origin).max() for axis in (queries.axis, keys.axis)]).max())
    find = _KeyIndex(keys.axis, length)

    # A row's first document may reach back beyond the row: the pattern says where to.
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

    # The documents that begin inside the row see keys from their own start up to the row's last query: one run of keys.
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

    # Runs of blocks, sorted; each begins where the runs before it have ended.
    first_block, order = first_block.sort(-1)
    stop_block = stop_block.gather(-1, order)
    reached = torch.nn.functional.pad(stop_block.cummax(-1).values[..., :-1], (1, 0))
    first_block = torch.maximum(first_block, reached)
    size = (stop_block - first_block).clamp(min=0)

    # One entry a tile: run `i` holds the entries from ends[i - 1] to ends[i].
    ends = size.flatten().cumsum(0)
    entry = torch.arange(int(ends[-1]), device=ends.device)
    run = torch.searchsorted(ends, entry, right=True)
    column = first_block.flatten()[run] + entry - (ends - size.flatten())[run]
    row = run // size.shape[-1]
    return row // queries.count, row % queries.count, column


class _KeyIndex:
    """Finds keys by (document, position): both rise along the axis, so one binary search does it."""

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


def _pack(visible: Tensor) -> Tensor:
    """Booleans `[tiles, block, block]` to bits, int32 `[tiles, block, ceil(block / 32)]`."""
    tiles, block, _ = visible.shape
    visible = torch.nn.functional.pad(visible, (0, -block % 32))
    if visible.device.type == "cpu":
        packed = np.packbits(visible.numpy(), axis=-1, bitorder="little")
        return torch.from_numpy(packed.view(np.int32).reshape(tiles, block, -(-block // 32)))
    shifts = torch.arange(32, dtype=torch.int32, device=visible.device)
    return (visible.view(tiles, block, -(-block // 32), 32).int() << shifts).sum(-1, dtype=torch.int32)


def _unique_masks(masks: Tensor) -> tuple[Tensor, Tensor]:
    """(the distinct masks, for each mask the index of its equal); an empty table becomes one tile of zeros.

    Masks are compared by a 64-bit hash and then for equality: where a hash collides, the table stays as it is.
    """
    if not len(masks):
        return masks.new_zeros(1, *masks.shape[1:]), torch.zeros(0, dtype=torch.int64, device=masks.device)
    words = masks.flatten(1).long()
    generator = torch.Generator().manual_seed(0)
    factors = torch.randint(-(2**62), 2**62, (words.shape[1],), generator=generator).to(words.device) * 2 + 1
    hashes, index = torch.unique((words * factors).sum(1), return_inverse=True)
    first = torch.full((len(hashes),), len(masks), device=masks.device)
    first = first.scatter_reduce(0, index, torch.arange(len(masks), device=masks.device), "amin")
    if not torch.equal(masks[first[index]], masks):
        return masks, torch.arange(len(masks), device=masks.device)
    return masks[first], index


def _list_tiles(
    group: Tensor, major: Tensor, minor: Tensor, tile: Tensor, shape: tuple[int, int, int], head_of: Iterable[int]
) -> TileList:
    """Tiles sorted by (group, major index, partial before full, minor index); heads pick their pattern's lists."""
    line = group * shape[2] + major
    order = torch.argsort((line * 2 + (tile == FULL)) * (int(minor.max()) + 1 if len(minor) else 1) + minor)
    lines = shape[0] * shape[1] * shape[2]
    count = torch.bincount(line, minlength=lines)
    partial = torch.bincount(line[tile != FULL], minlength=lines)
    start = count.cumsum(0) - count
    pick = lambda t: t.view(shape)[:, list(head_of)].int().contiguous()  # noqa: E731
    return TileList(pick(start), pick(count), pick(partial), minor[order].int(), tile[order].int())

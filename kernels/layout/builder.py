"""Builds the BlockLayout of a pattern over two axes, in three steps:

1. candidates.py lists the tiles that may hold a visible pair, from the intervals of `Pattern.candidates`.
2. tiles.py evaluates `Pattern.visible` on those tiles, drops the empty ones and packs the masks of the partial ones.
3. This file lists the tiles by rows (forward pass and dQ) and by columns (dK and dV).

Time and memory are proportional to the candidate tiles, not to the square of the length, and no Python loop runs over
rows. By default a layout is as small as possible, and the host reads the number of tiles from the device. With
`fixed=True`, for documents that change in every training step, sizes are upper bounds and the host never waits for the
device.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from kernels.layout.axis import Axis
from kernels.layout.block_layout import FULL, BlockLayout, Source, TileList
from kernels.layout.candidates import BlockedAxis
from kernels.layout.lru_cache import LRUCache
from kernels.layout.tiles import find_tiles, find_tiles_fixed, unique_masks
from kernels.patterns.base import Pattern
from kernels.shapes import BLOCK_SIZES


def build_layout(
    pattern: Pattern | Sequence[Pattern],
    queries: Axis,
    keys: Axis | None = None,
    block: int = 128,
    *,
    fixed: bool = False,
) -> BlockLayout:
    """The layout of `pattern`, or of one pattern per KV head. `keys=None`: the queries attend to themselves.

    Layouts of axes without packed documents are cached by their settings. `fixed`: for axes of packed documents, all
    sizes follow from shapes and settings, and the host does not wait for the device. `layout.overflow`, on the device,
    is True if the sizes were too small; a training loop must check it.

    Raises ValueError for a block that is not one of BLOCK_SIZES, an empty list of patterns, axes of different batch or
    device, queries of ranges (Axis.take) that a block straddles, and fixed sizes of axes without a `limit`.
    """
    keys = queries if keys is None else keys
    patterns = (pattern,) if isinstance(pattern, Pattern) else tuple(pattern)
    if block not in BLOCK_SIZES:
        raise ValueError(f"block={block}: must be one of {', '.join(map(str, BLOCK_SIZES))}")
    if not patterns:
        raise ValueError("pattern=[]: must be a pattern, or one pattern per KV head")
    if queries.device != keys.device:
        raise ValueError(f"queries on {queries.device}, keys on {keys.device}: must be on one device")
    if queries.batch != keys.batch and 1 not in (queries.batch, keys.batch):
        raise ValueError(f"queries of batch {queries.batch}, keys of batch {keys.batch}: must agree, or be 1")
    if any(each.start % block or len(each) % block for each in (queries.ranges or ())[:-1]):
        raise ValueError(f"queries of ranges {queries.ranges}: must be whole blocks of {block}, except the last range")
    if queries.key is not None and keys.key is not None:
        key = patterns, queries.key, keys.key, block, queries.device
        with torch.inference_mode(False):  # a layout that an evaluation builds is reused in training
            return _cache.get(key, lambda: _build(patterns, queries, keys, block, fixed=False))
    if fixed and (queries.limit is None or keys.limit is None):
        raise ValueError("fixed=True: must have axes with a limit (an upper bound of their positions)")
    return _build(patterns, queries, keys, block, fixed)


_cache: LRUCache[BlockLayout] = LRUCache(size=64)


def _build(patterns: tuple[Pattern, ...], queries: Axis, keys: Axis, block: int, fixed: bool) -> BlockLayout:
    distinct = list(dict.fromkeys(patterns))
    query_blocks = BlockedAxis(queries, block)
    key_blocks = query_blocks if keys is queries else BlockedAxis(keys, block)
    found = [(find_tiles_fixed if fixed else find_tiles)(p, query_blocks, key_blocks) for p in distinct]

    # One mask table for all patterns; heads with the same pattern share its entries.
    sizes = [0, *np.cumsum([len(t.masks) for t in found]).tolist()]
    tile = torch.cat([torch.where(t.tile == FULL, FULL, t.tile + n) for t, n in zip(found, sizes, strict=False)])
    masks = torch.cat([t.masks for t in found])
    if not fixed:
        masks, remap = unique_masks(masks)
        tile = torch.where(tile == FULL, FULL, remap[tile])
    head = torch.cat([torch.full_like(t.batch, i) for i, t in enumerate(found)])
    batch, row, column = (torch.cat([getattr(t, name) for t in found]) for name in ("batch", "row", "column"))
    live = torch.cat([t.live for t in found]) if fixed else None

    head_of = [distinct.index(p) for p in patterns] if len(distinct) > 1 else [0]
    shape = (max(queries.batch, keys.batch), len(distinct))
    source = Source(patterns, queries, keys)
    group = batch * len(distinct) + head
    return BlockLayout(
        queries=queries.length,
        keys=keys.length,
        block=block,
        rows=list_tiles(group, row, column, tile, live, (*shape, query_blocks.count, key_blocks.count), head_of),
        columns=list_tiles(group, column, row, tile, live, (*shape, key_blocks.count, query_blocks.count), head_of),
        masks=masks,
        pairs=torch.stack([found[index].pairs for index in head_of], 1),
        overflow=torch.stack([t.overflow for t in found]).any() if fixed else None,
        window=source.window,
        source=source,
    )


def list_tiles(
    group: Tensor,
    major: Tensor,
    minor: Tensor,
    tile: Tensor,
    live: Tensor | None,
    shape: tuple[int, int, int, int],
    head_of: Sequence[int],
) -> TileList:
    """Lists tiles by their major side, sorted by (group, major, partial before full, minor), with one list per head.

    group, major, minor and tile are int64 `[tiles]`; group = batch index x distinct patterns + pattern. major: the
    block index on the side that has the lists (rows or columns); minor: on the other side. `live` bool `[tiles]`: tiles
    that are not live are moved to the end, beyond every count (None: all are live). shape: batch, distinct patterns,
    major blocks, minor blocks. head_of: the pattern of each head.
    """
    *lists_shape, minors = shape
    lists = lists_shape[0] * lists_shape[1] * lists_shape[2]
    list_index = group * lists_shape[2] + major
    if live is not None:
        list_index = torch.where(live, list_index, lists)
    order = torch.argsort((list_index * 2 + (tile == FULL)) * minors + minor)

    def sum_by_list(values: Tensor) -> Tensor:
        sums = torch.zeros(lists + 1, dtype=torch.int64, device=tile.device)
        return sums.scatter_add_(0, list_index, values.long())[:lists]

    count, partial = sum_by_list(torch.ones_like(tile)), sum_by_list(tile != FULL)
    start = count.cumsum(0) - count
    # torch.stack, because indexing with a list copies it to the device and waits.
    pick = lambda t: torch.stack([t.view(lists_shape)[:, index] for index in head_of], 1).int()  # noqa: E731
    return TileList(pick(start), pick(count), pick(partial), minor[order].int(), tile[order].int())

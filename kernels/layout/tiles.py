"""Evaluates the candidate tiles and computes their masks: step 2 of the layout builder (builder.py).

The element-wise rule (`Pattern.visible`, same document, not in the future) is evaluated on the candidate tiles alone,
in chunks. Tiles without a visible pair are dropped; fully visible tiles need no mask; partial tiles get a mask of bits,
and equal tiles share it.

`find_tiles` sizes its results by the tiles that it finds. `find_tiles_fixed` never waits for the device: it reduces
each tile to its number of visible pairs and a hash, sorts equal hashes together, and computes the mask of one tile per
hash.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kernels.layout.block_layout import FULL
from kernels.layout.candidates import BlockedAxis, candidate_tiles, candidate_tiles_fixed
from kernels.layout.lru_cache import LRUCache
from kernels.patterns.base import Pattern

MASKS = 4096
MASKS_PER_ROW = 16
"""The mask table of a fixed-size layout has MASKS + MASKS_PER_ROW * (blocks of queries) entries. The mask of a tile of
128 x 128 pairs takes 2 KB. Each document boundary needs a few different masks. A pattern whose blocks are not aligned
with the tiles needs many."""

INT64_MAX = torch.iinfo(torch.int64).max


@dataclass(frozen=True, eq=False)
class Tiles:
    """Tiles in any order; `live` marks those that hold a visible pair (None: all)."""

    batch: Tensor  # int64 [tiles]
    row: Tensor
    column: Tensor
    tile: Tensor  # int64 [tiles]: FULL or an index into masks
    masks: Tensor  # int32 [masks, block, ceil(block / 32)]
    pairs: Tensor  # int64 [batch]
    live: Tensor | None = None  # bool [tiles]
    overflow: Tensor | None = None  # bool []: whether fixed sizes were too small; None: sizes are exact


def find_tiles(pattern: Pattern, queries: BlockedAxis, keys: BlockedAxis) -> Tiles:
    """The tiles of one pattern, with exact sizes; waits for the device."""
    batch, row, column = candidate_tiles(pattern, queries, keys)
    block = queries.block
    tile = torch.full_like(batch, FULL)
    kept = _inside_window(pattern, queries, keys, batch, row, column)
    pairs = torch.zeros(_batch(queries, keys), dtype=torch.int64, device=batch.device)
    pairs.index_add_(0, batch, kept * block**2)
    unknown = (~kept).nonzero().flatten()
    # One growing table: small tensors kept from every chunk would fragment the memory between the large freed ones, and
    # waste hundreds of megabytes.
    masks, used = torch.empty(64, block, -(-block // 32), dtype=torch.int32, device=batch.device), 0
    # Chunks fit in a CPU's cache, or fill a GPU.
    chunk = max(1, (1 << 19 if batch.device.type == "cpu" else 1 << 26) // block**2)
    for selected in unknown.split(chunk):
        visible = _visible(pattern, *_coordinates(queries, keys, batch[selected], row[selected], column[selected]))
        count = visible.sum((1, 2), dtype=torch.int32)  # twice as fast as in int64
        pairs.index_add_(0, batch[selected], count.long())
        partial = (count > 0) & (count < block**2)
        kept[selected] = count > 0
        packed, index = unique_masks(_pack(visible[partial]))
        tile[selected[partial]] = index + used
        if used + len(packed) > len(masks):
            masks = torch.cat([masks[:used], torch.empty_like(masks), torch.empty_like(packed)])
        masks[used : used + len(packed)] = packed
        used += len(packed)
    return Tiles(batch[kept], row[kept], column[kept], tile[kept], masks[:used], pairs)


def find_tiles_fixed(pattern: Pattern, queries: BlockedAxis, keys: BlockedAxis) -> Tiles:
    """The same tiles in lists of fixed size, which follows from shapes and settings; never waits for the device."""
    batch, row, column, live, overflow = candidate_tiles_fixed(pattern, queries, keys)
    entries, block = len(batch), queries.block
    count, hashes = _map_chunks(_count_and_hash, pattern, queries, keys, batch, row, column)
    live = live & (count > 0)
    pairs = torch.zeros(_batch(queries, keys), dtype=torch.int64, device=batch.device)
    pairs.index_add_(0, batch, torch.where(live, count, 0).long())

    # Sort partial tiles by hash; the first tile of each hash provides the mask for all of them.
    partial = live & (count < block**2)
    hashes, order = torch.where(partial, hashes, INT64_MAX).sort(stable=True)
    first = torch.ones_like(partial)
    first[1:] = hashes[1:] != hashes[:-1]
    first &= partial[order]
    mask_index = first.cumsum(0) - 1
    capacity = min(entries, MASKS + MASKS_PER_ROW * queries.count * len(pairs))
    tile = torch.full_like(batch, FULL)
    tile[order] = torch.where(partial[order], mask_index.clamp(max=capacity - 1), FULL)
    representative = torch.zeros(capacity + 1, dtype=torch.int64, device=batch.device)
    representative.scatter_(0, torch.where(first, mask_index, capacity).clamp(max=capacity), order)
    representative, distinct = representative[:capacity], first.sum()
    (masks,) = _map_chunks(
        _mask_bits, pattern, queries, keys, batch[representative], row[representative], column[representative]
    )
    used = torch.arange(capacity, device=batch.device) < distinct
    masks = torch.where(used[:, None, None], masks, 0)
    return Tiles(batch, row, column, tile, masks, pairs, live, overflow | (distinct > capacity))


def unique_masks(masks: Tensor) -> tuple[Tensor, Tensor]:
    """Returns (the distinct masks, the index of each mask among them); for no masks, a table of one mask of zeros.

    Masks are compared by a 64-bit hash, then for equality. If hashes collide, the masks are returned unchanged.
    """
    if not len(masks):
        return masks.new_zeros(1, *masks.shape[1:]), torch.zeros(0, dtype=torch.int64, device=masks.device)
    words = masks.flatten(1).long()
    factors = _random_words(words.shape[1], words.device) * 2 + 1
    hashes, index = torch.unique((words * factors).sum(1), return_inverse=True)
    first = torch.full((len(hashes),), len(masks), device=masks.device)
    first = first.scatter_reduce(0, index, torch.arange(len(masks), device=masks.device), "amin")
    if not torch.equal(masks[first[index]], masks):
        return masks, torch.arange(len(masks), device=masks.device)
    return masks[first], index


def _inside_window(
    pattern: Pattern, queries: BlockedAxis, keys: BlockedAxis, batch: Tensor, row: Tensor, column: Tensor
) -> Tensor:
    """Returns bool `[tiles]`: True for tiles inside a plain window and one document, all of whose pairs are visible.

    These pairs need no evaluation; full attention over T tokens has T^2 / 2 of them.
    """
    width = pattern.plain_window(1 << 30)  # of full attention: farther than any position
    if width is None or keys.axis.span > 1:
        return torch.zeros_like(batch, dtype=torch.bool)

    def bounds(of: BlockedAxis, index: Tensor) -> list[Tensor]:
        """The (first document, last document, first position, last position) of each tile's block."""
        place = batch.clamp(max=of.axis.batch - 1), index
        return [t[place] for x in (of.document, of.start) for t in (x.amin(-1), x.amax(-1))]

    of_queries, of_keys = bounds(queries, row), bounds(keys, column)
    low, high, first_query, last_query = of_queries
    key_low, key_high, first_key, last_key = of_keys
    one_document = (low == high) & (key_low == key_high) & (low == key_low) & (low >= 0)  # padding is document -1
    return one_document & (last_key <= first_query) & (last_query - first_key < width)


def _batch(queries: BlockedAxis, keys: BlockedAxis) -> int:
    return max(queries.axis.batch, keys.axis.batch)


def _coordinates(queries: BlockedAxis, keys: BlockedAxis, batch: Tensor, row: Tensor, column: Tensor) -> list[Tensor]:
    """The queries' (start, document, origin) of each tile, `[tiles, block, 1]`, and the keys' (start, end, document,
    origin), `[tiles, 1, block]`."""
    q = (batch.clamp(max=queries.axis.batch - 1), row)
    k = (batch.clamp(max=keys.axis.batch - 1), column)
    of_queries = [t[q][:, :, None] for t in (queries.start, queries.document, queries.origin)]
    return of_queries + [t[k][:, None, :] for t in (keys.start, keys.end, keys.document, keys.origin)]


def _visible(
    pattern: Pattern,
    query: Tensor,
    query_document: Tensor,
    query_origin: Tensor,
    key_start: Tensor,
    key_end: Tensor,
    key_document: Tensor,
    key_origin: Tensor,
) -> Tensor:
    """Whether each pair is visible: booleans `[tiles, block, block]`."""
    # Padding has document -1 on both axes. Of the queries it gets -2: cheaper than one more condition for each pair.
    query_document = torch.where(query_document < 0, -2, query_document)
    seen = (query_document == key_document) & (key_end <= query + 1)
    if pattern.anchor == "sequence":
        query, key_start, key_end = query + query_origin, key_start + key_origin, key_end + key_origin
    return seen & pattern.visible(query, key_start, key_end)


def _count_and_hash(pattern: Pattern, words: Tensor, *coordinates: Tensor) -> tuple[Tensor, Tensor]:
    """The number of visible pairs of each tile, int32 `[tiles]`, and a hash of its mask, int64 `[tiles]`.

    The hash is the sum of one random number per visible pair (`words`, int64 `[block, block]`); the hashes of two
    different masks are equal with probability 2^-64.
    """
    visible = _visible(pattern, *coordinates)
    return visible.sum((1, 2), dtype=torch.int32), torch.where(visible, words, 0).sum((1, 2))


def _mask_bits(pattern: Pattern, words: Tensor, *coordinates: Tensor) -> tuple[Tensor]:
    """The masks of the tiles, int32 `[tiles, block, ceil(block / 32)]`."""
    return (_pack_torch(_visible(pattern, *coordinates)),)


def _map_chunks(
    function: Callable[..., tuple[Tensor, ...]],
    pattern: Pattern,
    queries: BlockedAxis,
    keys: BlockedAxis,
    batch: Tensor,
    row: Tensor,
    column: Tensor,
) -> list[Tensor]:
    """Applies `function(pattern, words, *coordinates)` to all tiles, in chunks of equal size; on a GPU as fused
    kernels."""
    device, block = batch.device, queries.block
    max_tiles = (1 << 19 if device.type == "cpu" else 1 << 30) // block**2  # a CPU's cache; the range of int32 on a GPU
    chunks = -(-len(batch) // max(1, max_tiles))
    chunk = -(-len(batch) // chunks)
    words = _hash_words.get((block, device), lambda: _random_words(block**2, device).view(block, block))

    def run(first: int) -> tuple[Tensor, ...]:
        selected = [
            torch.nn.functional.pad(t[first : first + chunk], (0, max(0, first + chunk - len(t)))) for t in tiles
        ]
        coordinates = _coordinates(queries, keys, *selected)
        if device.type != "cuda":
            return function(pattern, words, *coordinates)
        from kernels.layout.fuse import fuse  # imported here because it loads the compiler

        key = function, pattern, block, chunk, device
        fused = _fused.get(
            key, lambda: fuse(lambda *tensors: function(pattern, *tensors), (words, *coordinates), chunk * block**2)
        )
        return fused(words, *coordinates)

    tiles = batch, row, column
    results = zip(*(run(first) for first in range(0, len(batch), chunk)), strict=True)
    return [torch.cat(values)[: len(batch)] for values in results]


_hash_words: LRUCache[Tensor] = LRUCache(size=16)
_fused: LRUCache[Callable] = LRUCache(size=256)


def _random_words(count: int, device: torch.device) -> Tensor:
    """int64 `[count]`: random numbers from a fixed seed."""
    generator = torch.Generator().manual_seed(0)
    high, low = (torch.randint(2**32, (count,), generator=generator) for _ in range(2))
    return ((high << 32) | low).to(device)


def _pack(visible: Tensor) -> Tensor:
    """Booleans `[tiles, block, block]` to bits, int32 `[tiles, block, ceil(block / 32)]`."""
    if visible.device.type != "cpu":
        return _pack_torch(visible)
    tiles, block, _ = visible.shape
    packed = np.packbits(torch.nn.functional.pad(visible, (0, -block % 32)).numpy(), axis=-1, bitorder="little")
    return torch.from_numpy(packed.view(np.int32).reshape(tiles, block, -(-block // 32)))


def _pack_torch(visible: Tensor) -> Tensor:
    """As `_pack`, in PyTorch operators, which can be traced and compiled."""
    tiles, block, _ = visible.shape
    visible = torch.nn.functional.pad(visible, (0, -block % 32)).view(tiles, block, -(-block // 32), 32)
    shifts = torch.arange(32, dtype=torch.int32, device=visible.device)
    return (visible.int() << shifts).sum(-1, dtype=torch.int32)

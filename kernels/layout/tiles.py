"""Which candidate tiles hold a visible pair, and which bits: the second step from a pattern to its layout.

The element-wise truth (`Pattern.visible`, same document, not in the future) is evaluated on the candidate tiles alone,
in chunks. Tiles without a visible pair are dropped; fully visible ones need no mask; the others get a mask of bits,
which equal tiles share.

`find_tiles` sizes its results by what it finds. `find_tiles_within` never asks the device for a value: each tile is
reduced to its number of visible pairs and a hash, equal hashes are sorted together, and the bits are computed of one
tile of each kind.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kernels.layout.block_layout import FULL
from kernels.layout.candidates import Blocks, candidate_places, candidate_tiles
from kernels.layout.lru_cache import RecentlyUsed
from kernels.patterns.base import Pattern

MASKS = 4096
MASKS_PER_ROW = 16
"""Room for different masks where sizes are fixed: MASKS, and MASKS_PER_ROW for each block of queries (2 KB a mask of
128 x 128). A document's edge makes a few new ones; a pattern whose blocks fit no tile makes many."""

LARGEST = torch.iinfo(torch.int64).max


@dataclass(frozen=True, eq=False)
class Tiles:
    """Tiles in no particular order; `live` says which of them hold a visible pair (None: all)."""

    batch: Tensor  # int64 [tiles]
    row: Tensor
    column: Tensor
    tile: Tensor  # int64 [tiles]: FULL or an index into masks
    masks: Tensor  # int32 [masks, block, ceil(block / 32)]
    pairs: Tensor  # int64 [batch]
    live: Tensor | None = None  # bool [tiles]
    overflow: Tensor | None = None  # bool []: whether fixed sizes were too small; None: they were not fixed


def find_tiles(pattern: Pattern, queries: Blocks, keys: Blocks) -> Tiles:
    """The tiles of one pattern, exactly."""
    batch, row, column = candidate_tiles(pattern, queries, keys)
    block = queries.block
    tile = torch.full_like(batch, FULL)
    pairs = torch.zeros(_batch(queries, keys), dtype=torch.int64, device=batch.device)
    kept = torch.zeros_like(batch, dtype=torch.bool)
    # One table that grows: small tensors kept from every chunk would lie between the large ones that are freed, and
    # hold on to hundreds of megabytes.
    masks, used = torch.empty(64, block, -(-block // 32), dtype=torch.int32, device=batch.device), 0
    # Chunks that stay in a CPU's cache, or that fill a GPU.
    chunk = max(1, (1 << 19 if batch.device.type == "cpu" else 1 << 26) // block**2)
    for first in range(0, len(batch), chunk):
        part = slice(first, first + chunk)
        visible = _visible(pattern, *_sides(queries, keys, batch[part], row[part], column[part]))
        count = visible.sum((1, 2))
        pairs.index_add_(0, batch[part], count)
        partial = (count > 0) & (count < block**2)
        kept[part] = count > 0
        packed, index = unique_masks(_pack(visible[partial]))
        tile[part][partial] = index + used
        if used + len(packed) > len(masks):
            masks = torch.cat([masks[:used], torch.empty_like(masks), torch.empty_like(packed)])
        masks[used : used + len(packed)] = packed
        used += len(packed)
    return Tiles(batch[kept], row[kept], column[kept], tile[kept], masks[:used], pairs)


def find_tiles_within(pattern: Pattern, queries: Blocks, keys: Blocks) -> Tiles:
    """The same tiles in fixed places: every size follows from shapes and settings, nothing waits for the device."""
    batch, row, column, live, overflow = candidate_places(pattern, queries, keys)
    places, block = len(batch), queries.block
    count, digest = _in_chunks(_summarize, pattern, queries, keys, batch, row, column)
    live = live & (count > 0)
    pairs = torch.zeros(_batch(queries, keys), dtype=torch.int64, device=batch.device)
    pairs.index_add_(0, batch, torch.where(live, count, 0).long())

    # Partial tiles by hash: the first of each kind stands for all of it.
    partial = live & (count < block**2)
    digest, order = torch.where(partial, digest, LARGEST).sort(stable=True)
    first = torch.ones_like(partial)
    first[1:] = digest[1:] != digest[:-1]
    first &= partial[order]
    kind = first.cumsum(0) - 1
    room = min(places, MASKS + MASKS_PER_ROW * queries.count * len(pairs))
    tile = torch.full_like(batch, FULL)
    tile[order] = torch.where(partial[order], kind.clamp(max=room - 1), FULL)
    chosen = torch.zeros(room + 1, dtype=torch.int64, device=batch.device)
    chosen.scatter_(0, torch.where(first, kind, room).clamp(max=room), order)
    chosen, kinds = chosen[:room], first.sum()
    (masks,) = _in_chunks(_bits, pattern, queries, keys, batch[chosen], row[chosen], column[chosen])
    used = torch.arange(room, device=batch.device) < kinds
    masks = torch.where(used[:, None, None], masks, 0)
    return Tiles(batch, row, column, tile, masks, pairs, live, overflow | (kinds > room))


def unique_masks(masks: Tensor) -> tuple[Tensor, Tensor]:
    """(the distinct masks, for each mask the index of its equal); an empty table becomes one tile of zeros.

    Masks are compared by a 64-bit hash and then for equality: where a hash collides, the table stays as it is.
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


def _batch(queries: Blocks, keys: Blocks) -> int:
    return max(queries.axis.batch, keys.axis.batch)


def _sides(queries: Blocks, keys: Blocks, batch: Tensor, row: Tensor, column: Tensor) -> list[Tensor]:
    """Of each tile the queries' (start, document, origin), `[tiles, block, 1]`, and the keys' (start, end, document,
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
    """The truth, element by element: booleans `[tiles, block, block]`."""
    seen = (query_document == key_document) & (query_document >= 0) & (key_end <= query + 1)
    if pattern.anchor == "sequence":
        query, key_start, key_end = query + query_origin, key_start + key_origin, key_end + key_origin
    return seen & pattern.visible(query, key_start, key_end)


def _summarize(pattern: Pattern, words: Tensor, *sides: Tensor) -> tuple[Tensor, Tensor]:
    """Visible pairs of each tile, int32 `[tiles]`, and a hash of which they are, int64 `[tiles]`: the sum of one random
    number a visible pair, `words` int64 `[block, block]`. Two different masks agree with a probability of 2^-64."""
    visible = _visible(pattern, *sides)
    return visible.sum((1, 2), dtype=torch.int32), torch.where(visible, words, 0).sum((1, 2))


def _bits(pattern: Pattern, words: Tensor, *sides: Tensor) -> tuple[Tensor]:
    """The tiles' masks, int32 `[tiles, block, ceil(block / 32)]`."""
    return (_pack_anywhere(_visible(pattern, *sides)),)


def _in_chunks(
    function: Callable[..., tuple[Tensor, ...]],
    pattern: Pattern,
    queries: Blocks,
    keys: Blocks,
    batch: Tensor,
    row: Tensor,
    column: Tensor,
) -> list[Tensor]:
    """`function(pattern, words, *sides)` of all tiles, in chunks of one size; on a GPU as fused kernels."""
    device, block = batch.device, queries.block
    most = (1 << 19 if device.type == "cpu" else 1 << 30) // block**2  # a CPU's cache; int32 indices on a GPU
    chunks = -(-len(batch) // max(1, most))
    chunk = -(-len(batch) // chunks)
    words = _hash_words.get((block, device), lambda: _random_words(block**2, device).view(block, block))

    def run(first: int) -> tuple[Tensor, ...]:
        part = [torch.nn.functional.pad(t[first : first + chunk], (0, max(0, first + chunk - len(t)))) for t in tiles]
        sides = _sides(queries, keys, *part)
        if device.type != "cuda":
            return function(pattern, words, *sides)
        from kernels.layout.fuse import fuse  # a compiler, which only this needs

        key = function, pattern, block, chunk, device
        fused = _fused.get(
            key, lambda: fuse(lambda *tensors: function(pattern, *tensors), (words, *sides), chunk * block**2)
        )
        return fused(words, *sides)

    tiles = batch, row, column
    results = zip(*(run(first) for first in range(0, len(batch), chunk)), strict=True)
    return [torch.cat(parts)[: len(batch)] for parts in results]


_hash_words: RecentlyUsed[Tensor] = RecentlyUsed(size=16)
_fused: RecentlyUsed[Callable] = RecentlyUsed(size=256)


def _random_words(count: int, device: torch.device) -> Tensor:
    """int64 `[count]`, always the same."""
    generator = torch.Generator().manual_seed(0)
    high, low = (torch.randint(2**32, (count,), generator=generator) for _ in range(2))
    return ((high << 32) | low).to(device)


def _pack(visible: Tensor) -> Tensor:
    """Booleans `[tiles, block, block]` to bits, int32 `[tiles, block, ceil(block / 32)]`."""
    if visible.device.type != "cpu":
        return _pack_anywhere(visible)
    tiles, block, _ = visible.shape
    packed = np.packbits(torch.nn.functional.pad(visible, (0, -block % 32)).numpy(), axis=-1, bitorder="little")
    return torch.from_numpy(packed.view(np.int32).reshape(tiles, block, -(-block // 32)))


def _pack_anywhere(visible: Tensor) -> Tensor:
    """`_pack` in PyTorch's own operators, which can be traced and compiled."""
    tiles, block, _ = visible.shape
    visible = torch.nn.functional.pad(visible, (0, -block % 32)).view(tiles, block, -(-block // 32), 32)
    shifts = torch.arange(32, dtype=torch.int32, device=visible.device)
    return (visible.int() << shifts).sum(-1, dtype=torch.int32)

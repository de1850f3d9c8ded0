"""Attention of a chunk's queries to the chunk and to the cached keys before it."""

from collections.abc import Sequence

import torch
from torch import Tensor

from kernels import BlockLayout, attention, merge
from kernels.decoding.decode_attention import decode_attention
from kernels.layout.cached_keys import CachedKeys
from model.kv_cache.cache_layout import QUERIES_AT_ONCE, Read
from model.kv_cache.step import MAX_UNTILED_TOKENS

DECODING = {"reference": "direct", "blocked": "direct", "triton": "triton", "hopper": "triton"}
"""Backend of the model -> backend of kernels.decoding.decode_attention. Other backends compute tiles alone: "auto"."""


def attend_to_all(
    q: Tensor, own: CachedKeys, past: Sequence[tuple[Read, CachedKeys]], fresh: Sequence[CachedKeys], backend: str
) -> tuple[Tensor, Tensor]:
    """One softmax over three sets of keys: (out, lse) as kernels.attention returns them.

    `own`: the tokens of the chunk; the mask may be a tile layout. `past`: cached keys, as Store.read returns them; a
    tile layout covers all queries. `fresh`: further keys that the chunk creates, such as summaries.
    """
    if isinstance(own.mask, Tensor):
        return attend_to_parts(q, [*(part for _, part in past), *fresh, own], backend)
    return _attend_in_groups(q, [own], past, fresh, backend)


def attend_to_past(
    q: Tensor, past: Sequence[tuple[Read, CachedKeys]], fresh: Sequence[CachedKeys], backend: str
) -> tuple[Tensor, Tensor]:
    """As `attend_to_all`, without the tokens of the chunk. Without a visible key, out is 0 and lse is -inf."""
    if q.shape[2] <= MAX_UNTILED_TOKENS:
        return attend_to_parts(q, [*(part for _, part in past), *fresh], backend)
    return _attend_in_groups(q, [], past, fresh, backend)


def attend_to_parts(q: Tensor, parts: Sequence[CachedKeys], backend: str) -> tuple[Tensor, Tensor]:
    """One softmax of at most QUERIES_AT_ONCE queries over all `parts`. Without parts, out is 0 and lse is -inf."""
    assert q.shape[2] <= QUERIES_AT_ONCE, "the queries are one group"
    return decode_attention(q, parts, backend=DECODING.get(backend, "auto")) if parts else nothing_seen(q)


def nothing_seen(q: Tensor) -> tuple[Tensor, Tensor]:
    """(out, lse) of queries that see no key."""
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return torch.zeros_like(q), torch.full(q.shape[:3], -torch.inf, dtype=dtype, device=q.device)


def _attend_in_groups(
    q: Tensor,
    tiled: list[CachedKeys],
    past: Sequence[tuple[Read, CachedKeys]],
    fresh: Sequence[CachedKeys],
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Attention of many queries. The kernels of training compute the parts that have a tile layout; the other parts are
    computed for one group of queries at a time."""
    tiled += [part for _, part in past if isinstance(part.mask, BlockLayout)]
    found = [attention(q, *part[:3], return_lse=True, backend=backend) for part in tiled]
    out, lse = merge(found) if found else nothing_seen(q)
    past = [(read, part) for read, part in past if not isinstance(part.mask, BlockLayout)]
    for first in range(0, q.shape[2], QUERIES_AT_ONCE):
        rows = slice(first, first + QUERIES_AT_ONCE)
        parts = [part for read, part in past if read.first == first]
        parts += [part.for_queries(rows) for part in fresh]
        if parts:
            seen = decode_attention(q[:, :, rows], parts, backend="direct")
            merged = merge([seen, (out[:, :, rows], lse[:, :, rows])])
            out[:, :, rows], lse[:, :, rows] = merged
    return out, lse

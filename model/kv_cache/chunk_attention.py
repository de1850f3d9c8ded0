"""Attention of a chunk's queries to the chunk and to the cached keys before it."""

from collections.abc import Sequence

import torch
from torch import Tensor

from kernels import BlockLayout, attention, merge
from kernels.decoding.decode_attention import decode_attention
from kernels.layout.cached_keys import CachedKeys
from model.kv_cache.cache_layout import QUERIES_AT_ONCE, Read
from model.kv_cache.step import MAX_UNTILED_TOKENS

DECODING = {"reference": "direct", "blocked": "direct", "triton": "triton"}
"""A model's backend -> that of its decoding (kernels.decode_attention); of others, which only know tiles: "auto"."""


def attend_to_all(
    q: Tensor, own: CachedKeys, past: Sequence[tuple[Read, CachedKeys]], fresh: Sequence[CachedKeys], backend: str
) -> tuple[Tensor, Tensor]:
    """One softmax over the chunk (`own`, whose mask may be a layout), what the store gives of the `past`, and `fresh`
    keys that the chunk has brought beside its tokens: (out, lse) as kernels.attention. Layouts are for all queries."""
    if isinstance(own.mask, Tensor):
        return attend_to_parts(q, [*(part for _, part in past), *fresh, own], backend)
    return _attend_in_groups(q, [own], past, fresh, backend)


def attend_to_past(
    q: Tensor, past: Sequence[tuple[Read, CachedKeys]], fresh: Sequence[CachedKeys], backend: str
) -> tuple[Tensor, Tensor]:
    """As `attend_to_all`, of keys that stand for no token of the chunk alone; 0 and -inf where there are none."""
    if q.shape[2] <= MAX_UNTILED_TOKENS:
        return attend_to_parts(q, [*(part for _, part in past), *fresh], backend)
    return _attend_in_groups(q, [], past, fresh, backend)


def attend_to_parts(q: Tensor, parts: Sequence[CachedKeys], backend: str) -> tuple[Tensor, Tensor]:
    """One softmax of MAX_UNTILED_TOKENS queries over all `parts`; 0 and -inf where there is none."""
    assert q.shape[2] <= QUERIES_AT_ONCE, "few queries are one group"
    return decode_attention(q, parts, backend=DECODING.get(backend, "auto")) if parts else nothing_seen(q)


def nothing_seen(q: Tensor) -> tuple[Tensor, Tensor]:
    """(out, lse) of queries without a key."""
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return torch.zeros_like(q), torch.full(q.shape[:3], -torch.inf, dtype=dtype, device=q.device)


def _attend_in_groups(
    q: Tensor,
    tiled: list[CachedKeys],
    past: Sequence[tuple[Read, CachedKeys]],
    fresh: Sequence[CachedKeys],
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Many queries: those parts whose masks are layouts by the kernels of training, others group by group."""
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

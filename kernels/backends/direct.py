"""Attention of a decoding step in plain PyTorch, on any device: the backend `direct` of `decode_attention`."""

from collections.abc import Sequence

import torch
from torch import Tensor

from kernels.backends.masked_product import all_finite, can_synchronize, masked_product
from kernels.layout.cached_keys import CachedKeys

SCORES_PER_CHUNK = 1 << 26
"""Scores per chunk of queries: 256 MB in float32."""


def attend(q: Tensor, key_sets: Sequence[CachedKeys], scale: float) -> tuple[Tensor, Tensor]:
    """(out, lse), see kernels.decode_attention: out in q's dtype, lse in float32 (float64 for float64 inputs)."""
    key_sets = [gather_entries(keys) for keys in key_sets]
    chunk_size = max(
        1, SCORES_PER_CHUNK // (q.shape[0] * q.shape[1] * max(1, sum(keys.k.shape[2] for keys in key_sets)))
    )
    results = []
    for first in range(0, q.shape[2], chunk_size):
        rows = slice(first, first + chunk_size)
        row_keys = [keys.for_queries(rows) for keys in key_sets]
        results.append(_attend(q[:, :, rows], row_keys, scale))
    return torch.cat([out for out, _ in results], 2), torch.cat([lse for _, lse in results], 2)


def gather_entries(keys: CachedKeys) -> CachedKeys:
    """The same keys in the order of their entries: gathered from their slots, with one head per head group."""
    k, v, mask, slots, count, page = keys
    entries, head_groups = mask.shape[3], max(k.shape[1], mask.shape[1], 1 if slots is None else slots.shape[1])
    entry = torch.arange(entries, device=k.device)
    if count is not None:
        mask = mask & (entry < count[:, None])[:, None, None]
    if slots is None:
        k, v = (_expand_groups(x[:, :, :entries], head_groups) for x in (k, v))
    else:
        listed = _expand_groups(slots, head_groups)
        mask = _expand_groups(mask, head_groups) & (listed >= 0).repeat_interleave(page, 2)[:, :, None]
        batch = torch.arange(len(k), device=k.device)[:, None, None]
        head = torch.arange(head_groups, device=k.device)[:, None] // (head_groups // k.shape[1])
        k, v = (take_pages(x, batch, head, listed.clamp(min=0).long(), page).flatten(2, 3) for x in (k, v))
    return keys._replace(k=k, v=v, mask=mask, slots=None, count=None, page=1)


def take_pages(x: Tensor, batch: Tensor, head: Tensor, page: Tensor, size: int) -> Tensor:
    """Gathers pages of `size` consecutive slots of x `[batch, kv_heads, slots, head_dim]`.

    batch, head and page are integers that broadcast to `[...]`. Returns `[..., size, head_dim]`.
    """
    heads, slots, head_dim = x.shape[1:]
    first = (batch * heads + head) * slots + page * size
    # A view with one row per run of `size` slots; rows overlap, and a page is one row.
    x = x.contiguous()
    runs = x.as_strided((len(x) * heads * slots - size + 1, size, head_dim), (head_dim, head_dim, 1))
    return runs.index_select(0, first.flatten()).view(*first.shape, size, head_dim)


def _expand_groups(x: Tensor, head_groups: int) -> Tensor:
    """Repeats dimension 1 of x to `head_groups` entries; a size of 1 is left to broadcast."""
    return x if x.shape[1] in (1, head_groups) else x.repeat_interleave(head_groups // x.shape[1], 1)


def _attend(q: Tensor, key_sets: Sequence[CachedKeys], scale: float) -> tuple[Tensor, Tensor]:
    batch, heads, queries, head_dim = q.shape
    head_groups = max(keys.k.shape[1] for keys in key_sets)
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    with torch.autocast(q.device.type, enabled=False):
        grouped = q.reshape(batch * head_groups, -1, head_dim)  # the rows are the query heads of a group
        scores, values, masks = [], [], []
        for keys in key_sets:
            k, v = (_expand_groups(x, head_groups).expand(-1, head_groups, -1, -1) for x in keys[:2])
            values.append(v)
            mask = _expand_groups(keys.mask, head_groups)
            masks.append(mask)
            score = _product(grouped, k.flatten(0, 1).mT, dtype).mul_(scale)
            score = score.view(batch, head_groups, -1, queries, k.shape[2])
            scores.append(score.masked_fill_(~mask[:, :, None], -torch.inf))
        score = torch.cat(scores, -1) if len(scores) > 1 else scores[0]
        highest = score.amax(-1, keepdim=True)
        highest = torch.where(highest == -torch.inf, 0.0, highest)
        weights = score.sub_(highest).exp_()
        total = weights.sum(-1, keepdim=True)
        lse = (highest + total.log()).view(batch, heads, queries)
        weights.div_(torch.where(total > 0, total, 1.0))
        split = weights.flatten(2, 3).split([v.shape[2] for v in values], -1)
        out = sum(weight.to(v.dtype) @ v for weight, v in zip(split, values, strict=True))
        if not (can_synchronize(q) and all_finite(out)):  # a hidden value may be NaN, and 0 * NaN is NaN
            masks = [mask[:, :, None].expand(-1, -1, heads // head_groups, queries, -1).flatten(2, 3) for mask in masks]
            split = [torch.where(mask, weight, 0.0) for mask, weight in zip(masks, split, strict=True)]
            each = zip(split, values, masks, strict=True)
            out = sum(masked_product(weight.to(v.dtype), v, mask) for weight, v, mask in each)
        return out.view(batch, heads, queries, head_dim).to(q.dtype), lse


def _product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """The batched product of a and b, accumulated and returned in `dtype`: scores rounded to bfloat16 would change the
    softmax by several percent."""
    if a.is_cuda and a.dtype != dtype:
        return torch.bmm(a, b, out_dtype=dtype)
    return torch.bmm(a.to(dtype), b.to(dtype))

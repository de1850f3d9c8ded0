"""Attention to keys in several tensors, without tiles, in plain PyTorch: `kernels.decode_attention` anywhere."""

from collections.abc import Sequence

import torch
from torch import Tensor

from kernels.backends.masked_product import all_finite, masked_product, may_wait
from kernels.layout.cached_keys import CachedKeys

SCORES_AT_ONCE = 1 << 26
"""Scores in one piece: 256 MB in float32."""


def attend(q: Tensor, parts: Sequence[CachedKeys], scale: float) -> tuple[Tensor, Tensor]:
    """(out, lse), see kernels.decode_attention: out in q's dtype, lse in float32 (float64 for float64 inputs)."""
    parts = [plain(part) for part in parts]
    at_once = max(1, SCORES_AT_ONCE // (q.shape[0] * q.shape[1] * max(1, sum(part.k.shape[2] for part in parts))))
    pieces = []
    for first in range(0, q.shape[2], at_once):
        rows = slice(first, first + at_once)
        cut = [part.of(rows) for part in parts]
        pieces.append(_attend(q[:, :, rows], cut, scale))
    return torch.cat([out for out, _ in pieces], 2), torch.cat([lse for _, lse in pieces], 2)


def plain(part: CachedKeys) -> CachedKeys:
    """The same keys, entry by entry: gathered where they lie in slots, with a head for every line."""
    k, v, mask, slots, count, page = part
    entries, lines = mask.shape[3], max(k.shape[1], mask.shape[1], 1 if slots is None else slots.shape[1])
    entry = torch.arange(entries, device=k.device)
    if count is not None:
        mask = mask & (entry < count[:, None])[:, None, None]
    if slots is None:
        k, v = (_by_line(x[:, :, :entries], lines) for x in (k, v))
    else:
        listed = _by_line(slots, lines)
        mask = _by_line(mask, lines) & (listed >= 0).repeat_interleave(page, 2)[:, :, None]
        batch = torch.arange(len(k), device=k.device)[:, None, None]
        head = torch.arange(lines, device=k.device)[:, None] // (lines // k.shape[1])
        k, v = (take_pages(x, batch, head, listed.clamp(min=0).long(), page).flatten(2, 3) for x in (k, v))
    return part._replace(k=k, v=v, mask=mask, slots=None, count=None, page=1)


def take_pages(x: Tensor, batch: Tensor, head: Tensor, page: Tensor, size: int) -> Tensor:
    """Pages of `size` slots of x `[batch, kv_heads, slots, head_dim]`, named by integers that broadcast together:
    `[..., size, head_dim]`."""
    heads, slots, head_dim = x.shape[1:]
    first = (batch * heads + head) * slots + page * size
    # All runs of `size` slots, of which any can be taken as one row: a view whose rows overlap.
    x = x.contiguous()
    runs = x.as_strided((len(x) * heads * slots - size + 1, size, head_dim), (head_dim, head_dim, 1))
    return runs.index_select(0, first.flatten()).view(*first.shape, size, head_dim)


def _by_line(x: Tensor, lines: int) -> Tensor:
    """x with dimension 1 repeated for each of `lines` (size 1, which serves all, stays)."""
    return x if x.shape[1] in (1, lines) else x.repeat_interleave(lines // x.shape[1], 1)


def _attend(q: Tensor, parts: Sequence[CachedKeys], scale: float) -> tuple[Tensor, Tensor]:
    batch, heads, queries, head_dim = q.shape
    lines = max(part.k.shape[1] for part in parts)
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    with torch.autocast(q.device.type, enabled=False):
        grouped = q.reshape(batch * lines, -1, head_dim)  # the query heads of a line are its rows
        scores, values, masks = [], [], []
        for part in parts:
            k, v = (_by_line(x, lines).expand(-1, lines, -1, -1) for x in part[:2])
            values.append(v)
            mask = _by_line(part.mask, lines)
            masks.append(mask)
            score = _product(grouped, k.flatten(0, 1).mT, dtype).mul_(scale)
            score = score.view(batch, lines, -1, queries, k.shape[2])
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
        if not (may_wait(q) and all_finite(out)):  # a hidden value may be NaN, of which a weight of 0 makes NaN
            masks = [mask[:, :, None].expand(-1, -1, heads // lines, queries, -1).flatten(2, 3) for mask in masks]
            split = [torch.where(mask, weight, 0.0) for mask, weight in zip(masks, split, strict=True)]
            each = zip(split, values, masks, strict=True)
            out = sum(masked_product(weight.to(v.dtype), v, mask) for weight, v, mask in each)
        return out.view(batch, heads, queries, head_dim).to(q.dtype), lse


def _product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """The batched product of a and b, summed and given in `dtype`: scores rounded to bfloat16 would be off by percents
    after the exponential."""
    if a.is_cuda and a.dtype != dtype:
        return torch.bmm(a, b, out_dtype=dtype)
    return torch.bmm(a.to(dtype), b.to(dtype))

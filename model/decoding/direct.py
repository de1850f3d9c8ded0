"""Softmax attention to keys in several tensors, without tiles: for few queries, whose keys were chosen before."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

SCORES_AT_ONCE = 1 << 26
"""Scores in one piece: 256 MB in float32."""


class Part(NamedTuple):
    """k and v `[batch, kv_heads, keys, head_dim]`, and which of them each query sees: booleans `[batch or 1, kv_heads
    or 1, queries or 1, keys]`."""

    k: Tensor
    v: Tensor
    mask: Tensor

    def of(self, queries: slice) -> "Part":
        """For some of the queries."""
        return self if self.mask.shape[2] == 1 else Part(self.k, self.v, self.mask[:, :, queries])


def attend(q: Tensor, parts: Sequence[Part], scale: float) -> tuple[Tensor, Tensor]:
    """One softmax over the keys of all `parts`: out as q `[batch, heads, queries, head_dim]` and lse `[batch, heads,
    queries]` in float32 (float64 for float64 inputs); 0 and -inf where nothing is seen."""
    at_once = max(1, SCORES_AT_ONCE // (q.shape[0] * q.shape[1] * max(1, sum(part.k.shape[2] for part in parts))))
    pieces = []
    for first in range(0, q.shape[2], at_once):
        rows = slice(first, first + at_once)
        cut = [part.of(rows) for part in parts]
        pieces.append(_attend(q[:, :, rows], cut, scale))
    return torch.cat([out for out, _ in pieces], 2), torch.cat([lse for _, lse in pieces], 2)


def _attend(q: Tensor, parts: Sequence[Part], scale: float) -> tuple[Tensor, Tensor]:
    batch, heads, queries, head_dim = q.shape
    kv_heads = parts[0].k.shape[1]
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    with torch.autocast(q.device.type, enabled=False):
        grouped = q.reshape(batch * kv_heads, -1, head_dim)  # the query heads of a KV head are its rows
        scores = []
        for part in parts:
            score = _product(grouped, part.k.flatten(0, 1).mT, dtype).mul_(scale)
            score = score.view(batch, kv_heads, -1, queries, part.k.shape[2])
            scores.append(score.masked_fill_(~part.mask[:, :, None], -torch.inf))
        score = torch.cat(scores, -1) if len(scores) > 1 else scores[0]
        highest = score.amax(-1, keepdim=True)
        highest = torch.where(highest == -torch.inf, 0.0, highest)
        weights = score.sub_(highest).exp_()
        total = weights.sum(-1, keepdim=True)
        lse = (highest + total.log()).view(batch, heads, queries)
        weights.div_(torch.where(total > 0, total, 1.0))
        split = weights.flatten(2, 3).split([part.k.shape[2] for part in parts], -1)
        out = sum(weight.to(part.v.dtype) @ part.v for weight, part in zip(split, parts, strict=True))
        return out.view(batch, heads, queries, head_dim).to(q.dtype), lse


def _product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """The batched product of a and b, summed and given in `dtype`: scores rounded to bfloat16 would be off by percents
    after the exponential."""
    if a.is_cuda and a.dtype != dtype:
        return torch.bmm(a, b, out_dtype=dtype)
    return torch.bmm(a.to(dtype), b.to(dtype))

"""The oracle: dense masked softmax attention in float32 or float64, with the gradients that autograd derives."""

import torch
from torch import Tensor

from kernels.layout import BlockLayout


def unsupported(q: Tensor, k: Tensor, v: Tensor, layout: BlockLayout) -> str | None:
    """It serves whatever `attention()` accepts, as far as memory reaches."""
    return None


def masked_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Softmax attention where `mask` allows.

    q `[batch, heads, queries, head_dim]`, k and v `[batch, kv_heads, keys, head_dim]`, mask bool, broadcastable to
    `[batch, kv_heads, queries, keys]`. Returns out, in q's dtype, and the log-sum-exp of the scaled scores
    `[batch, heads, queries]` in float32 (float64 for float64 inputs). A query that sees nothing gets 0 and -inf.
    """
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    batch, heads, queries, head_dim = q.shape
    kv_heads = k.shape[1]
    grouped = q.to(dtype).view(batch, kv_heads, heads // kv_heads, queries, head_dim)
    scores = grouped @ k.to(dtype)[:, :, None].mT * scale
    mask = mask[:, :, None]
    # Scores that are -inf throughout a row would make NaN gradients, so masked ones stay finite until they are dropped.
    weights = torch.where(mask, scores, -torch.inf)
    highest = weights.detach().amax(-1, keepdim=True).clamp(min=torch.finfo(dtype).min)
    weights = torch.where(mask, (torch.where(mask, scores, highest) - highest).exp(), 0.0)
    total = weights.sum(-1, keepdim=True)
    seen = total > 0
    total = torch.where(seen, total, 1.0)
    out = (weights / total) @ v.to(dtype)[:, :, None]
    lse = torch.where(seen, total.log() + highest, -torch.inf)
    return out.view_as(q).to(q.dtype), lse.reshape(batch, heads, queries)


def attention(
    q: Tensor, k: Tensor, v: Tensor, layout: BlockLayout, scale: float, with_lse: bool = True
) -> tuple[Tensor, Tensor]:
    """`masked_attention` under the layout's mask, always with its lse: time and memory of order queries x keys."""
    return masked_attention(q, k, v, layout.dense_mask(), scale)

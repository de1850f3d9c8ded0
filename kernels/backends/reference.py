"""The reference: dense masked softmax attention in float32 or float64; hidden pairs have no effect, even if they hold
NaN."""

import torch
from torch import Tensor

from kernels.backends.masked_product import masked_product
from kernels.layout.block_layout import BlockLayout


def unsupported(q: Tensor, k: Tensor, v: Tensor, layout: BlockLayout) -> str | None:
    """None: the reference serves every call that `attention()` accepts."""
    return None


def masked_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Softmax attention over the pairs that `mask` makes visible.

    q `[batch, heads, queries, head_dim]`, k and v `[batch, kv_heads, keys, head_dim]`, mask bool, broadcastable to
    `[batch, kv_heads, queries, keys]`. Returns out, in q's dtype, and the log-sum-exp of the scaled scores
    `[batch, heads, queries]` in float32 (float64 for float64 inputs). A query without visible keys gets 0 and -inf.
    """
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    batch, heads, queries, head_dim = q.shape
    kv_heads = k.shape[1]
    grouped = q.to(dtype).view(batch, kv_heads, heads // kv_heads, queries, head_dim)
    mask = mask[:, :, None]
    scores = _Scores.apply(grouped, k.to(dtype)[:, :, None], mask) * scale
    # A row of -inf would have NaN gradients, so masked scores stay finite until their weights are set to 0.
    weights = torch.where(mask, scores, -torch.inf)
    highest = weights.detach().amax(-1, keepdim=True).clamp(min=torch.finfo(dtype).min)
    weights = torch.where(mask, (torch.where(mask, scores, highest) - highest).exp(), 0.0)
    total = weights.sum(-1, keepdim=True)
    seen = total != 0  # True for NaN, too
    total = torch.where(seen, total, 1.0)
    average = torch.where(mask, weights / total, 0.0)  # if total is NaN, so is 0 / total
    out = _Average.apply(average, v.to(dtype)[:, :, None], mask)
    lse = torch.where(seen, total.log() + highest, -torch.inf)
    return out.view_as(q).to(q.dtype), lse.reshape(batch, heads, queries)


class _Scores(torch.autograd.Function):
    """`q @ k.mT`, whose gradients sum over visible pairs alone."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, mask: Tensor) -> Tensor:
        ctx.save_for_backward(q, k, mask)
        return q @ k.mT

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        q, k, mask = ctx.saved_tensors
        return masked_product(grad, k, mask), masked_product(grad.mT, q, mask.mT).sum(2, keepdim=True), None


class _Average(torch.autograd.Function):
    """`weights @ v`, where the sums and those of the gradients are over visible pairs alone."""

    @staticmethod
    def forward(ctx, weights: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        ctx.save_for_backward(weights, v, mask)
        return masked_product(weights, v, mask)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        weights, v, mask = ctx.saved_tensors
        grad_weights = torch.where(mask, grad @ v.mT, 0.0)
        return grad_weights, masked_product(weights.mT, grad, mask.mT).sum(2, keepdim=True), None


def attention(
    q: Tensor, k: Tensor, v: Tensor, layout: BlockLayout, scale: float, with_lse: bool = True
) -> tuple[Tensor, Tensor]:
    """`masked_attention` under the layout's mask; always returns the lse. Time and memory are O(queries x keys)."""
    return masked_attention(q, k, v, layout.dense_mask(), scale)

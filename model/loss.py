"""Cross-entropy straight from hidden states, a chunk of tokens at a time: never [tokens, vocabulary] at once."""

import torch
from torch import Tensor

from kernels import fp8
from kernels.cross_entropy import IGNORE, cross_entropy_
from kernels.shapes import is_concrete

__all__ = ["IGNORE", "linear_cross_entropy"]

LOGITS = 1 << 28
"""Logits of a chunk on a GPU: 512 MB in bf16."""

TILE = 256
"""The number of tokens in a chunk on a GPU, and in a selection of scored tokens, is a multiple of TILE, so that the
tiles of matrix products are full."""

SELECTED = 7 / 8
"""Scored tokens are selected only if they are at most this share of all tokens. In text, where only the last token of a
document is not scored, none are selected, and the sums keep their order."""


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    z_loss: float = 0.0,
    in_fp8: bool = False,
    scored: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Next-token losses of `hidden @ weight.T`.

    hidden `[tokens, width]`, weight `[vocabulary, width]`, targets int64 `[tokens]` (IGNORE: not scored). z_loss:
    weight of the penalty on the square of the log-sum-exp of a token's logits. Returns (total, per_token) in nats and
    float32: the sum over scored tokens of losses and penalties, with gradients to hidden and weight, and each token's
    loss (0 where not scored), without. Products run in the autocast dtype where autocast is on; softmax and sums in
    float32. in_fp8: the logits are products of e4m3 numbers (kernels/fp8.py); the products of their gradient are not.
    scored: an upper bound of the number of scored targets, counted on the host. If it is small (SELECTED), logits are
    computed for so many tokens alone, rounded up to a multiple of TILE.
    """
    if not torch.is_grad_enabled():  # an autograd.Function is asked for gradients even under no_grad
        hidden, weight = hidden.detach(), weight.detach()
    rows = None if scored is None else _scored_rows(targets, scored)
    return _LinearCrossEntropy.apply(hidden, weight, targets, z_loss, in_fp8, rows)


def _scored_rows(targets: Tensor, scored: int) -> Tensor | None:
    """Returns the indices of all scored tokens, and of other tokens up to a multiple of TILE. Returns None if logits of
    all tokens are to be computed. The host does not wait for the device."""
    size = -(-scored // TILE) * TILE
    if size > SELECTED * len(targets):
        return None
    return (targets == IGNORE).to(torch.int8).argsort(stable=True)[:size]


class _LinearCrossEntropy(torch.autograd.Function):
    """Gradients are taken while a chunk's logits are at hand, so the logits are neither kept nor computed twice."""

    @staticmethod
    def forward(
        ctx, hidden: Tensor, weight: Tensor, targets: Tensor, z_loss: float, in_fp8: bool, rows: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        accumulate = torch.float64 if dtype == torch.float64 else torch.float32
        per_token = torch.zeros(len(targets), dtype=accumulate, device=hidden.device)
        penalty = torch.zeros((), dtype=accumulate, device=hidden.device)
        train_hidden, train_weight = ctx.needs_input_grad[:2]
        grad_hidden = None
        if train_hidden:
            grad_hidden = torch.empty_like(hidden) if rows is None else torch.zeros_like(hidden)
        grad_weight = torch.zeros_like(weight, dtype=accumulate) if train_weight else None
        with torch.autocast(device, enabled=False):
            matrix = weight.to(dtype)
            quantized = fp8.quantize(weight) if in_fp8 else None
            chunks = token_chunks(len(targets if rows is None else rows), weight.shape[0], device)
            for part in chunks if rows is None else [rows[chunk] for chunk in chunks]:
                states = hidden[part].to(dtype)
                if quantized is None:
                    logits = states @ matrix.T
                else:
                    logits = fp8.product(fp8.quantize(states), quantized, dtype, fast=True)
                losses = cross_entropy_(logits, targets[part], z_loss, train_hidden or train_weight)
                per_token[part] = losses.per_token
                if losses.penalty is not None:
                    penalty += losses.penalty.sum()
                if train_hidden:
                    grad_hidden[part] = (losses.gradient @ matrix).to(hidden.dtype)
                if train_weight:
                    _add_product(grad_weight, losses.gradient.T, states)
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.weight_dtype = weight.dtype
        ctx.mark_non_differentiable(per_token)
        total = per_token.sum()
        return total + penalty if z_loss else total, per_token

    @staticmethod
    def backward(ctx, grad_total: Tensor, _) -> tuple[Tensor | None, Tensor | None, None, None, None, None]:
        grad_hidden, grad_weight = ctx.saved_tensors
        if grad_hidden is not None:
            grad_hidden = grad_hidden * grad_total.to(grad_hidden.dtype)
        if grad_weight is not None:
            grad_weight = (grad_weight * grad_total).to(ctx.weight_dtype)
        return grad_hidden, grad_weight, None, None, None, None


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right, summed in `total`'s dtype where the device's products can be."""
    # PyTorch 2.11 has no fake-tensor kernel for this product.
    in_float32 = total.dtype == torch.float32 and left.dtype in (torch.bfloat16, torch.float16)
    if total.is_cuda and in_float32 and is_concrete(total):
        torch.ops.aten.addmm.dtype_out(total, left, right, torch.float32, out=total)
    else:
        total += left @ right


def token_chunks(tokens: int, vocabulary: int, device: str) -> list[slice]:
    """Slices of tokens whose logits fit a CPU's cache (4 MB in float32), or that fill a GPU (LOGITS)."""
    if device == "cpu":
        size = max(1, (1 << 20) // vocabulary)
    else:
        chunks = -(-tokens * vocabulary // LOGITS)
        size = max(1, -(-tokens // max(1, chunks * TILE)) * TILE)
    return [slice(first, first + size) for first in range(0, tokens, size)]

"""Cross-entropy straight from hidden states, a chunk of tokens at a time: never [tokens, vocabulary] at once."""

import torch
from torch import Tensor
from torch.nn import functional as F

IGNORE = -100
"""The target of a token that is not scored."""


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Next-token losses of `hidden @ weight.T`.

    hidden `[tokens, width]`, weight `[vocabulary, width]`, targets int64 `[tokens]` (IGNORE: not scored). Returns
    (total, per_token) in nats and float32: the sum over scored tokens, with gradients to hidden and weight, and each
    token's loss (0 where not scored), without. Products run in the autocast dtype where autocast is on; softmax and
    sums in float32.
    """
    if not torch.is_grad_enabled():  # an autograd.Function is asked for gradients even under no_grad
        hidden, weight = hidden.detach(), weight.detach()
    return _LinearCrossEntropy.apply(hidden, weight, targets)


class _LinearCrossEntropy(torch.autograd.Function):
    """Gradients are taken while a chunk's logits are at hand, so the logits are neither kept nor computed twice."""

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        accumulate = torch.float64 if dtype == torch.float64 else torch.float32
        per_token = torch.zeros(len(targets), dtype=accumulate, device=hidden.device)
        train_hidden, train_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.empty_like(hidden) if train_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=accumulate) if train_weight else None
        with torch.autocast(device, enabled=False):
            matrix = weight.to(dtype)
            for part in _chunks(len(targets), weight.shape[0], device):
                states, wanted = hidden[part].to(dtype), targets[part]
                scored = wanted != IGNORE
                log_probabilities = (states @ matrix.T).to(accumulate).log_softmax(-1)
                per_token[part] = F.nll_loss(log_probabilities, wanted, ignore_index=IGNORE, reduction="none")
                if not (train_hidden or train_weight):
                    continue
                # d loss / d logits = softmax - onehot
                grad = log_probabilities.exp_()
                index = wanted.clamp(min=0)[:, None]
                grad.scatter_add_(1, index, torch.full_like(index, -1, dtype=accumulate))
                grad = grad.mul_(scored[:, None]).to(dtype)
                if train_hidden:
                    grad_hidden[part] = (grad @ matrix).to(hidden.dtype)
                if train_weight:
                    grad_weight += grad.T @ states
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.weight_dtype = weight.dtype
        ctx.mark_non_differentiable(per_token)
        return per_token.sum(), per_token

    @staticmethod
    def backward(ctx, grad_total: Tensor, _) -> tuple[Tensor | None, Tensor | None, None]:
        grad_hidden, grad_weight = ctx.saved_tensors
        if grad_hidden is not None:
            grad_hidden = grad_hidden * grad_total.to(grad_hidden.dtype)
        if grad_weight is not None:
            grad_weight = (grad_weight * grad_total).to(ctx.weight_dtype)
        return grad_hidden, grad_weight, None


def _chunks(tokens: int, vocabulary: int, device: str) -> list[slice]:
    """Slices of tokens whose logits take 4 MB of a CPU's cache, or 256 MB of a GPU's memory, in float32."""
    logits = 1 << 20 if device == "cpu" else 1 << 26
    size = max(1, logits // vocabulary)
    return [slice(first, first + size) for first in range(0, tokens, size)]

"""Cross-entropy of logits and its gradient, which may overwrite the logits.

On a GPU, one Triton kernel reads each row of logits and overwrites it with its gradient. Plain PyTorch serves other
devices and float64.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.dispatch import has_triton

IGNORE = -100
"""The target of a token that is not scored."""


class CrossEntropy(NamedTuple):
    """The losses of all tokens, and their gradient.

    `per_token` `[tokens]`: the loss of each token in nats; 0 if it is not scored. `penalty` `[tokens]`: z_loss times
    the square of the log-sum-exp of the token's logits; None if z_loss is 0. Both are float32 (float64 for float64
    logits). `gradient` `[tokens, vocabulary]`: the gradient of the sum of both with respect to the logits, in their
    dtype; None unless requested.
    """

    per_token: Tensor
    penalty: Tensor | None
    gradient: Tensor | None


def cross_entropy_(logits: Tensor, targets: Tensor, z_loss: float = 0.0, gradient: bool = True) -> CrossEntropy:
    """Computes losses and gradients; the gradient may overwrite `logits`.

    logits `[tokens, vocabulary]`, contiguous; targets int64 `[tokens]`, IGNORE for tokens that are not scored. Softmax
    and sums are in float32 (float64 for float64 logits). z_loss: weight of the penalty on the log-sum-exp (PaLM,
    arXiv:2204.02311).
    """
    if logits.is_cuda and logits.dtype != torch.float64 and has_triton():
        per_token, penalty = torch.ops.farsight.cross_entropy_(logits, targets, z_loss, gradient)
        return CrossEntropy(per_token, penalty if z_loss else None, logits if gradient else None)
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    scored = targets != IGNORE
    log_probabilities = logits.to(dtype)
    lse = log_probabilities.logsumexp(-1) if z_loss else None
    log_probabilities = log_probabilities.log_softmax(-1)
    per_token = F.nll_loss(log_probabilities, targets, ignore_index=IGNORE, reduction="none")
    penalty = None if lse is None else z_loss * lse.square() * scored
    if not gradient:
        return CrossEntropy(per_token, penalty, None)
    grad = log_probabilities.exp_()  # d loss / d logits = softmax - onehot
    if lse is not None:
        grad *= (1 + 2 * z_loss * lse)[:, None]
    index = targets.clamp(min=0)[:, None]
    grad.scatter_add_(1, index, torch.full_like(index, -1, dtype=dtype))
    return CrossEntropy(per_token, penalty, grad.mul_(scored[:, None]).to(logits.dtype))


@torch.library.custom_op("farsight::cross_entropy_", mutates_args=("logits",))
def _on_gpu(logits: Tensor, targets: Tensor, z_loss: float, gradient: bool) -> tuple[Tensor, Tensor]:
    from kernels.backends.triton.cross_entropy import cross_entropy_ as in_triton

    return in_triton(logits, targets, z_loss, gradient)


@_on_gpu.register_fake
def _(logits, targets, z_loss, gradient):
    return tuple(logits.new_empty(len(targets), dtype=torch.float32) for _ in range(2))

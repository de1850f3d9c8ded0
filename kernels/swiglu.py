"""SwiGLU of gate and up projections that lie side by side in one tensor.

On a GPU one Triton kernel makes the values and another one the gradients, which it writes side by side: the projections
are one matrix product then, forward and backward. (torch.compile joins two gradients in a kernel that takes twice as
long.) Plain PyTorch serves other devices and float64.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.dispatch import has_triton


def swiglu(joined: Tensor) -> Tensor:
    """joined `[..., 2 * width]`, gate before up, contiguous -> silu(gate) * up `[..., width]`, in the same dtype."""
    if joined.is_cuda and joined.dtype != torch.float64 and has_triton():
        return torch.ops.farsight.swiglu(joined)
    gate, up = joined.chunk(2, -1)
    return F.silu(gate) * up


@torch.library.custom_op("farsight::swiglu", mutates_args=())
def _swiglu(joined: Tensor) -> Tensor:
    from kernels.backends.triton.swiglu import swiglu as in_triton

    return in_triton(joined)


@_swiglu.register_fake
def _(joined):
    return joined.new_empty(*joined.shape[:-1], joined.shape[-1] // 2)


@torch.library.custom_op("farsight::swiglu_backward", mutates_args=())
def _swiglu_backward(grad: Tensor, joined: Tensor) -> Tensor:
    from kernels.backends.triton.swiglu import swiglu_backward as in_triton

    return in_triton(grad, joined)


@_swiglu_backward.register_fake
def _(grad, joined):
    return torch.empty_like(joined)


def _setup_context(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _autograd(ctx, grad: Tensor) -> Tensor:
    return torch.ops.farsight.swiglu_backward(grad, *ctx.saved_tensors)


_swiglu.register_autograd(_autograd, setup_context=_setup_context)

"""Matrix products of 8-bit floating-point numbers (e4m3), which a GPU multiplies at twice the rate of bf16.

    x [rows, inner] --quantize--> values e4m3, a scale for each row
    values of both operands --product--> [rows, columns], each number multiplied by the scales of its row and column

A scale belongs to one row of an operand: a token, or an output feature of a weight. So no token's result depends on
other tokens, and causality holds as in other precisions. Scales are powers of two: a product with one is exact, and
only the rounding of the values to four significant bits makes a difference. (One scale for each row: PyTorch's row-wise
`_scaled_mm`; e4m3: Micikevicius et al. 2022, arXiv:2209.05433.)
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.shapes import require

E4M3 = torch.float8_e4m3fn
LARGEST = torch.finfo(E4M3).max

SMALLEST_ROW = 2.0**-100
"""Rows whose numbers are all smaller share one scale, so that scales stay finite in float32."""

EMULATE = False
"""Whether a CPU computes the products, in float32 from the same 8-bit numbers. Tests set it."""

MULTIPLE = 16
"""Both sides of a weight must be multiples of this."""


class Quantized(NamedTuple):
    """A matrix `values * scale`, up to rounding. values: e4m3 `[rows, inner]`; scale: float32 `[rows, 1]`."""

    values: Tensor
    scale: Tensor


def quantize(x: Tensor) -> Quantized:
    """x `[rows, inner]`, float32 or bf16 -> the nearest e4m3 numbers, with a scale for each row.

    The scale is the smallest power of two with which the largest number of the row is in e4m3's range. Numbers down to
    2^-13 of the row's largest are rounded by 1/16 of themselves at most, smaller ones by 2^-17 of the largest.
    """
    largest = torch.linalg.vector_norm(x, torch.inf, 1, keepdim=True).float().clamp(min=SMALLEST_ROW)
    # 2^exponent without the fraction; a NaN becomes an infinity, which multiplies to NaN.
    factor = ((LARGEST / largest).view(torch.int32) & 0x7F800000).view(torch.float32)
    return Quantized((x * factor.to(x.dtype)).to(E4M3).contiguous(), 1 / factor)


def product(left: Quantized, right: Quantized, dtype: torch.dtype, fast: bool) -> Tensor:
    """left `[rows, inner]`, right `[columns, inner]` -> left @ right.T `[rows, columns]` in `dtype`, bf16 on a GPU.

    fast: sum in the registers of Hopper's tensor cores, with about 14 bits (DeepSeek-V3, arXiv:2412.19437, section
        3.5.2), rather than in float32.

    Raises ValueError on a CPU, unless EMULATE is set.
    """
    on_gpu = left.values.is_cuda
    require(on_gpu or EMULATE, f"products in fp8 on {left.values.device}: must be on a GPU")
    if not on_gpu:  # PyTorch 2.11 has no such product on a CPU, and drops gradients where `.to` returns its argument
        exact = left.values.float() @ right.values.float().t() * left.scale * right.scale.t()
        return exact.to(dtype, copy=True)
    return torch._scaled_mm(
        left.values, right.values.t(), left.scale, right.scale.t(), out_dtype=dtype, use_fast_accum=fast
    )


def linear(x: Tensor, *weights: Tensor) -> Tensor:
    """As `F.linear`: x `[..., inner]`, weights `[columns, inner]` -> `[..., columns]`, in the autocast dtype or x's.
    The outputs of several weights are one product, side by side.

    The product and the gradient of x are products of e4m3 numbers. The gradient of the weights, a sum over all tokens,
    is a product in x's dtype: quantizing both operands anew, along the tokens, would cost more time than it saves.

    The backward pass joins and quantizes the weights again, so that no copy of them is kept, which FSDP2 could not free
    as it frees gathered weights.
    """
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    return _Linear.apply(x.to(dtype).flatten(0, -2), *weights).unflatten(0, x.shape[:-1])


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, *weights: Tensor) -> Tensor:
        ctx.save_for_backward(x, *weights)
        with torch.autocast(x.device.type, enabled=False):
            return product(quantize(x), quantize(_joined(weights)), x.dtype, fast=True)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, *weights = ctx.saved_tensors
        grad_x, grad_weights = None, [None] * len(weights)
        with torch.autocast(x.device.type, enabled=False):
            if ctx.needs_input_grad[0]:
                grad_x = product(quantize(grad), quantize(_joined(weights).t()), x.dtype, fast=False)
            if any(ctx.needs_input_grad[1:]):
                grad_weights = (grad.t() @ x).to(weights[0].dtype).split([len(weight) for weight in weights])
        wanted = ctx.needs_input_grad[1:]
        return grad_x, *(each if needed else None for each, needed in zip(grad_weights, wanted, strict=True))


def _joined(weights: Sequence[Tensor]) -> Tensor:
    return weights[0] if len(weights) == 1 else torch.cat(weights)

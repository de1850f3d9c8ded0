"""Rounding to e4m3 and products of rounded numbers, in float64 and without PyTorch's 8-bit types."""

from torch import Tensor


def rounded(x: Tensor) -> Tensor:
    """float64 `[rows, inner]` -> the nearest numbers with four significant bits, ties to even. With the row's scale, a
    power of two, the largest number is in (224, 448] and the smallest step is 2^-9."""
    scale = 2.0 ** (448 / x.abs().amax(1, keepdim=True)).log2().floor()
    exponent = (x * scale).abs().clamp(min=2.0**-6).log2().floor()
    step = 2.0 ** (exponent - 3)
    return (x * scale / step).round() * step / scale


def linear(x: Tensor, weight: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x `[rows, inner]`, weight `[columns, inner]`, grad `[rows, columns]`, float64: the product of rounded operands,
    its gradient with respect to x likewise, and that with respect to weight, which is not rounded."""
    return rounded(x) @ rounded(weight).T, rounded(grad) @ rounded(weight.T).T, grad.T @ x

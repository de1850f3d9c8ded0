"""Rotary position embeddings (Su et al. 2021), and two scalings of them to contexts beyond the trained length."""

import math

import torch
from torch import Tensor, nn

from kernels.dispatch import has_triton
from model.config import ModelConfig

ONE_KERNEL_TOKENS = 8
"""Longest input that one kernel rotates: there, launching kernels takes longer than running them."""


class RotaryEmbedding(nn.Module):
    """Computes the cosines and sines of the angles by which queries and keys are rotated.

    Angles are computed in float64: at position 10^6 a float32 angle is off by hundredths of a radian.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        frequencies, self.magnitude = _frequencies(config)
        self.register_buffer("frequencies", frequencies, persistent=False)

    def forward(self, position: Tensor) -> tuple[Tensor, Tensor]:
        """position `[batch, length]` -> cos, sin, float32 `[batch, length, 1, head_dim / 2]`."""
        angles = position.double()[..., None, None] * self.frequencies
        return (angles.cos() * self.magnitude).float(), (angles.sin() * self.magnitude).float()

    def _apply(self, fn, recurse=True):
        # `.bfloat16()` or `.half()` on the model must not round the frequencies; moving to a device still may.
        frequencies = self.frequencies
        super()._apply(fn, recurse)
        device = self.frequencies.device
        if frequencies.is_meta and device.type != "meta":  # moved from meta: `to_empty` allocates memory
            with torch.device("cpu"):
                frequencies, _ = _frequencies(self.config)
        self.frequencies = frequencies.to(device)
        return self


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates the pairs (i, i + head_dim / 2) of x `[batch, length, heads, head_dim]`, computing in float32.

    On a GPU without gradients, up to ONE_KERNEL_TOKENS tokens take one kernel instead of nine.
    """
    plain = torch.is_grad_enabled() or torch.compiler.is_compiling() or x.dtype == torch.float64
    if x.is_cuda and x.shape[1] <= ONE_KERNEL_TOKENS and not plain and has_triton():
        from kernels.backends.triton.rotate import rotate as in_one_kernel

        return in_one_kernel(x, cos, sin)
    first, second = x.float().chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(x.dtype)


def _frequencies(config: ModelConfig) -> tuple[Tensor, float]:
    """Returns the radians per token, float64 `[head_dim / 2]`, and the factor on cosines and sines."""
    half, factor, theta = config.head_dim // 2, config.rope_factor, config.rope_theta
    exponents = torch.arange(half, dtype=torch.float64) / half
    if config.rope_scaling == "ntk":
        # NTK-aware: a larger base slows the slowest frequency by the factor and keeps the fastest.
        return (theta * factor ** (half / (half - 1))) ** -exponents, 1.0
    base = theta**-exponents
    if config.rope_scaling == "yarn":
        # YaRN: keep frequencies with over 32 turns in the original length, slow those with less than one by the factor.
        turns = config.rope_original_length * base / (2 * math.pi)
        keep = ((turns - 1) / (32 - 1)).clamp(0, 1)
        return base * keep + base / factor * (1 - keep), 0.1 * math.log(factor) + 1
    return base, 1.0

"""Rotary position embeddings (Su et al. 2021), and scalings of them to contexts beyond the trained length.

`ModelConfig.rope_scaling`, with the factor s and frequencies b^(-2i/d):

    linear    every frequency divided by s (kaiokendev 2023)
    ntk       a larger base, which slows the slowest frequency by s and keeps the fastest (bloc97 2023)
    dynamic   as ntk, with a base that grows with the length L of a document beyond the original length; transformers'
              formula, with s L / original - (s - 1) in place of s (emozilla 2023)
    llama3    frequencies with many turns in the original length stay, those with few are divided by s (Llama 3.1)
    yarn      as llama3, and cosines and sines get a factor (Peng et al. 2023, equations 17 to 23)
    yarn_hf   yarn as transformers and YaRN's published code compute it: the transition is linear in the dimension i,
              not in the number of turns

A layer's pattern may have rotary embeddings of its own (model.config.Rope): another base, without scaling, or none.
"""

import math
from dataclasses import replace

import torch
from torch import Tensor, nn

from kernels.dispatch import has_triton
from model.config import ATTENTION_FACTORS, MODEL_ROPE, NO_ROPE, ModelConfig, Rope

ONE_KERNEL_TOKENS = 8
"""Longest input that one kernel rotates: there, launching kernels takes longer than running them."""


class RotaryEmbedding(nn.Module):
    """Computes the cosines and sines of the angles by which queries and keys are rotated.

    Angles are computed in float64: at position 10^6 a float32 angle is off by hundredths of a radian. Without rotary
    embeddings all angles are 0, so that every family, cache and kernel computes layers of both kinds alike.
    """

    def __init__(self, config: ModelConfig, rope: Rope = MODEL_ROPE) -> None:
        super().__init__()
        if rope != MODEL_ROPE:
            base = config.rope_theta if isinstance(rope, str) else rope
            unscaled = {"rope_scaling": "none", "rope_factor": 1.0, "rope_attention_factor": None}
            config = replace(config, rope_theta=base, **unscaled)
        self.config, self.rotates = config, rope != NO_ROPE
        frequencies, self.magnitude = self._compute_frequencies()
        self.register_buffer("frequencies", frequencies, persistent=False)

    @property
    def device(self) -> torch.device:
        return self.frequencies.device

    def _compute_frequencies(self) -> tuple[Tensor, float]:
        frequencies, magnitude = _frequencies(self.config)
        return frequencies * self.rotates, magnitude

    def forward(self, position: Tensor) -> tuple[Tensor, Tensor]:
        """position `[batch, length]` -> cos, sin, float32 `[batch, length, 1, head_dim / 2]`.

        Under `dynamic` scaling, the frequencies of a document depend on its last position in this call. A cache keeps
        the keys of earlier calls as they were rotated then, as in transformers.
        """
        frequencies = self.frequencies
        if self.config.rope_scaling == "dynamic":
            frequencies = _dynamic_frequencies(self.config, document_lengths(position)[..., None, None].double())
        angles = position.double()[..., None, None] * frequencies
        return (angles.cos() * self.magnitude).float(), (angles.sin() * self.magnitude).float()

    def _apply(self, fn, recurse=True):
        # `.bfloat16()` or `.half()` on the model must not round the frequencies; moving to a device still may.
        frequencies = self.frequencies
        super()._apply(fn, recurse)
        device = self.frequencies.device
        if frequencies.is_meta and device.type != "meta":  # moved from meta: `to_empty` allocates memory
            with torch.device("cpu"):
                frequencies, _ = self._compute_frequencies()
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


def document_lengths(position: Tensor) -> Tensor:
    """For each token, one more than the last position of its document in `position`, int64 `[batch, length]`. A
    document begins at position 0; that of the first tokens may have begun earlier."""
    document = (position == 0).cumsum(-1)
    last = position.new_zeros(position.shape[0], position.shape[1] + 1)
    return last.scatter_reduce(-1, document, position, "amax").gather(-1, document) + 1


def _frequencies(config: ModelConfig) -> tuple[Tensor, float]:
    """Returns the radians per token, float64 `[head_dim / 2]`, and the factor on cosines and sines. `dynamic`: those of
    documents of at most the original length."""
    half, factor, theta = config.head_dim // 2, config.rope_factor, config.rope_theta
    exponents = torch.arange(half, dtype=torch.float64) / half
    base = theta**-exponents
    if config.rope_scaling == "linear":
        return base / factor, 1.0
    if config.rope_scaling == "ntk":
        return (theta * factor ** (half / (half - 1))) ** -exponents, 1.0
    if config.rope_scaling in ("llama3", "yarn", "yarn_hf"):
        keep = _kept_by_dimension(config) if config.rope_scaling == "yarn_hf" else _kept_by_turns(config, base)
        return base * keep + base / factor * (1 - keep), _attention_factor(config)
    return base, 1.0


def _dynamic_frequencies(config: ModelConfig, length: Tensor) -> Tensor:
    """Frequencies of `dynamic` scaling, float64 `[..., head_dim / 2]`, for documents of `length` tokens `[..., 1]`."""
    half, factor = config.head_dim // 2, config.rope_factor
    exponents = torch.arange(half, dtype=torch.float64, device=length.device) / half
    stretch = factor * length.clamp(min=config.rope_original_length) / config.rope_original_length - (factor - 1)
    return (config.rope_theta * stretch ** (half / (half - 1))) ** -exponents


def _attention_factor(config: ModelConfig) -> float:
    if config.rope_scaling not in ATTENTION_FACTORS:
        return 1.0
    given = config.rope_attention_factor
    return 0.1 * math.log(config.rope_factor) + 1 if given is None else given


def _kept_by_turns(config: ModelConfig, base: Tensor) -> Tensor:
    """The share of each frequency that is not slowed, float64 `[head_dim / 2]`: linear in its turns in the original
    length."""
    turns = config.rope_original_length * base / (2 * math.pi)
    return ((turns - config.rope_beta_slow) / (config.rope_beta_fast - config.rope_beta_slow)).clamp(0, 1)


def _kept_by_dimension(config: ModelConfig) -> Tensor:
    """As `_kept_by_turns`, linear in the index of the frequency, between the indices whose frequencies have
    `rope_beta_fast` and `rope_beta_slow` turns."""

    def index(turns: float) -> float:
        wavelength = config.rope_original_length / turns
        return config.head_dim * math.log(wavelength / (2 * math.pi)) / (2 * math.log(config.rope_theta))

    first, last = index(config.rope_beta_fast), index(config.rope_beta_slow)
    if config.rope_truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, config.head_dim - 1)  # transformers' bounds, which it compares with indices
    if first == last:
        last += 0.001
    slowed = (torch.arange(config.head_dim // 2, dtype=torch.float64) - first) / (last - first)
    return 1 - slowed.clamp(0, 1)

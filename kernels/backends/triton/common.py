"""What the attention kernels share: how tensors are described to the hardware, and how a tile's mask is applied."""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels.shapes import compute_capability

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
HEAD_DIMS = (32, 64, 96, 128, 192, 256)

LOG2_E = 1.4426950408889634
LN_2 = tl.constexpr(0.6931471805599453)


def unsupported(device: torch.device | str, dtype: torch.dtype, head_dim: int | None = None) -> str | None:
    """Why no kernel of this folder can serve such tensors, with what is accepted; None where they can."""
    if dtype not in DTYPES:
        return f"dtype {dtype}: must be one of {', '.join(map(str, DTYPES))}"
    if head_dim is not None and head_dim not in HEAD_DIMS:
        return f"head_dim {head_dim}: must be one of {', '.join(map(str, HEAD_DIMS))}"
    kind = torch.device(device).type
    if kind == "cuda":
        capability = compute_capability(device)
        if capability < (8, 0):
            return f"compute capability {capability[0]}.{capability[1]}: must be 8.0 or later"
    elif not triton.knobs.runtime.interpret:
        return f"device {kind}: must be cuda (or cpu under TRITON_INTERPRET=1, for tests)"
    return None


def positive_scale(q: Tensor, scale: float) -> tuple[Tensor, float]:
    """(q, scale) of the same scores with scale > 0, so that scaling keeps their order and never meets 0 * inf."""
    return (-q, -scale) if scale < 0 else (q, max(scale, 1e-30))


def describe(x: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """Describes x `[batch, heads, length, head_dim]` by boxes `[1, 1, rows, columns]`; outside of x one reads zeros.

    On sm90 and later a load is one TMA transfer: 64-bit addresses and bounds cost nothing. x must be `addressable`.
    """
    # A dimension of size 1 may carry any stride, also one that TMA refuses.
    strides = [s if n > 1 else x.shape[-1] * 16 for s, n in zip(x.stride(), x.shape, strict=True)]
    strides[-1] = 1
    return TensorDescriptor(x, list(x.shape), strides, [1, 1, rows, columns])


def addressable(x: Tensor) -> Tensor:
    """x itself where a descriptor can address it (16-byte aligned, rows contiguous), else a contiguous copy."""
    step = 16 // x.element_size()
    aligned = all(s > 0 and s % step == 0 for s, n in zip(x.stride()[:-1], x.shape[:-1], strict=True) if n > 1)
    fits = (x.stride(-1) == 1 or x.shape[-1] == 1) and aligned and x.data_ptr() % 16 == 0
    return x if fits else x.clone(memory_format=torch.contiguous_format)


@triton.jit
def load_words(wanted, words, lines, first, WORDS: tl.constexpr, WIDTH: tl.constexpr):
    """The mask of `lines` x `WIDTH` pairs: four int32 `[lines]` of 32 columns each, as many as there are; else zeros.

    wanted: false gives zeros. words: the tile's mask, `WORDS` int32 a line. lines: the lines' indices in the tile.
    first: the tile's column to begin with.
    """
    # In the backward kernels each word goes straight to the registers of the threads that hold the line's scores, and
    # is asked for before the product that it will mask.
    pointer = words + lines * WORDS + first // 32
    a = tl.zeros_like(lines)
    b = a
    c = a
    d = a
    if wanted:
        a = tl.load(pointer)
        if WIDTH >= 64:
            b = tl.load(pointer + 1)
        if WIDTH >= 128:
            c = tl.load(pointer + 2)
            d = tl.load(pointer + 3)
    return a, b, c, d


@triton.jit
def masked(scores, a, b, c, d, first, WIDTH: tl.constexpr):
    """`scores` `[lines, WIDTH]`, -inf where the words of `load_words` hide the pair."""
    column = tl.arange(0, WIDTH)
    word = a[:, None]
    if WIDTH >= 64:
        word = tl.where((column >= 32)[None, :], b[:, None], word)
    if WIDTH >= 128:
        word = tl.where((column >= 64)[None, :], c[:, None], word)
        word = tl.where((column >= 96)[None, :], d[:, None], word)
    if WIDTH < 32:
        column += first & 31
    # The shift in two parts: what differs between threads (bits 1 and 2 of the column, in an mma accumulator), and the
    # rest, known to the compiler.
    bit = (word >> (column & 6)[None, :]) & (1 << (column & 25))[None, :]
    return tl.where(bit != 0, scores, float("-inf"))


@triton.jit
def all_finite(x):
    """Whether no element of x `[rows, columns]` is NaN or infinite, nor their sum."""
    return tl.abs(tl.sum(tl.sum(x, 1), 0)) < float("inf")


@triton.jit
def masked_dot(left, right, visible, sums, PRECISION: tl.constexpr):
    """sums + left @ right over `visible` pairs alone, outside of which left is 0: 0 * NaN would be NaN.

    As kernels.backends.masked_product: an infinity of `right` keeps its sign.
    """
    wide = right.to(tl.float32)
    below = wide < float("inf")
    above = wide > float("-inf")
    shown = tl.where(visible, 1.0, 0.0).to(right.dtype)
    clean = tl.where(below & above, wide, 0.0).to(right.dtype)
    sums = tl.dot(left.to(right.dtype), clean, sums, input_precision=PRECISION)
    rising = tl.dot(shown, tl.where(below, 0.0, 1.0).to(right.dtype), input_precision=PRECISION)
    sums += tl.where(rising > 0, float("inf"), 0.0)
    falling = tl.dot(shown, tl.where(above, 0.0, 1.0).to(right.dtype), input_precision=PRECISION)
    return sums - tl.where(falling > 0, float("inf"), 0.0)

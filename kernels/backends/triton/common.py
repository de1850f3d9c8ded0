"""Helpers of the attention kernels: tensor descriptors, masks of tiles, products over visible pairs."""

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
    """Why the kernels of this package cannot serve such tensors, with what is accepted; None if they can."""
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
    """Returns (q, scale) with the same scores and scale > 0, so that scaling keeps their order and never computes 0 *
    inf."""
    return (-q, -scale) if scale < 0 else (q, max(scale, 1e-30))


def describe(x: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """A descriptor of x `[batch, heads, length, head_dim]` with blocks `[1, 1, rows, columns]`; loads outside x return
    0.

    On sm90 and later a load is one TMA transfer, in which 64-bit addresses and bounds checks cost nothing. x must be
    `addressable`.
    """
    return TensorDescriptor(x, list(x.shape), tma_strides(x), [1, 1, rows, columns])


def tma_strides(x: Tensor) -> list[int]:
    """The strides of x for a descriptor. Dimensions of size 1 get one that TMA accepts: theirs does not matter."""
    strides = [s if n > 1 else x.shape[-1] * 16 for s, n in zip(x.stride(), x.shape, strict=True)]
    return [*strides[:-1], 1]


def addressable(x: Tensor) -> Tensor:
    """x itself if a descriptor can address it (16-byte aligned, contiguous rows), else a contiguous copy."""
    step = 16 // x.element_size()
    aligned = all(s > 0 and s % step == 0 for s, n in zip(x.stride()[:-1], x.shape[:-1], strict=True) if n > 1)
    fits = (x.stride(-1) == 1 or x.shape[-1] == 1) and aligned and x.data_ptr() % 16 == 0
    return x if fits else x.clone(memory_format=torch.contiguous_format)


@triton.jit
def load_words(wanted, words, rows, first, WORDS: tl.constexpr, WIDTH: tl.constexpr):
    """The mask of `rows` x `WIDTH` pairs: four int32 `[rows]` with 32 columns each; zeros beyond WIDTH.

    wanted: if false, all are zeros. words: the tile's mask, `WORDS` int32 per row. rows: the row indices in the tile.
    first: the first column in the tile.
    """
    # In the backward kernels, each word is loaded by the threads that hold the scores of its row, before the product
    # that it masks.
    pointer = words + rows * WORDS + first // 32
    a = tl.zeros_like(rows)
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
    """`scores` `[rows, WIDTH]`, with -inf for the pairs that the words of `load_words` hide."""
    column = tl.arange(0, WIDTH)
    word = a[:, None]
    if WIDTH >= 64:
        word = tl.where((column >= 32)[None, :], b[:, None], word)
    if WIDTH >= 128:
        word = tl.where((column >= 64)[None, :], c[:, None], word)
        word = tl.where((column >= 96)[None, :], d[:, None], word)
    if WIDTH < 32:
        column += first & 31
    # The shift is divided: bits 1 and 2 of the column differ between threads (in an mma accumulator); the others are
    # compile-time constants.
    bit = (word >> (column & 6)[None, :]) & (1 << (column & 25))[None, :]
    return tl.where(bit != 0, scores, float("-inf"))


@triton.jit
def all_finite(x):
    """Whether all elements of x `[rows, columns]`, and their sum, are finite."""
    return tl.abs(tl.sum(tl.sum(x, 1), 0)) < float("inf")


@triton.jit
def masked_dot(left, right, visible, sums, PRECISION: tl.constexpr):
    """sums + left @ right over `visible` pairs alone; left is 0 for hidden pairs, but 0 * NaN would be NaN.

    As in kernels.backends.masked_product, an infinity in `right` keeps its sign.
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

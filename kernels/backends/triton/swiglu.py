"""SwiGLU and its gradient: each reads and writes every number once, and computes in float32."""

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS, COLUMNS = 4, 512
"""The tile of a program."""


def swiglu(joined: Tensor) -> Tensor:
    """As kernels.swiglu.swiglu."""
    joined = joined.contiguous()
    width = joined.shape[-1] // 2
    out = joined.new_empty(*joined.shape[:-1], width)
    rows = out.numel() // width if width else 0
    if rows:
        _values[_grid(rows, width)](joined, out, rows, width, ROWS=ROWS, COLUMNS=COLUMNS)
    return out


def swiglu_backward(grad: Tensor, joined: Tensor) -> Tensor:
    """The gradient of `joined`; grad `[..., width]` is that of the output."""
    joined, grad = joined.contiguous(), grad.contiguous()
    width, out = grad.shape[-1], torch.empty_like(joined)
    rows = grad.numel() // width if width else 0
    if rows:
        _gradients[_grid(rows, width)](grad, joined, out, rows, width, ROWS=ROWS, COLUMNS=COLUMNS)
    return out


def _grid(rows: int, width: int) -> tuple[int, int]:
    return triton.cdiv(rows, ROWS), triton.cdiv(width, COLUMNS)


@triton.jit
def _tile(rows, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """(row `[ROWS, 1]`, column `[1, COLUMNS]`, inside) of this program; rows in int64."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    return row, column, (row < rows) & (column < width)


@triton.jit
def _values(joined, out, rows, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    row, column, inside = _tile(rows, width, ROWS, COLUMNS)
    gate = tl.load(joined + row * (2 * width) + column, inside).to(tl.float32)
    up = tl.load(joined + row * (2 * width) + width + column, inside).to(tl.float32)
    value = gate * tl.sigmoid(gate) * up
    tl.store(out + row * width + column, value.to(out.dtype.element_ty), inside)


@triton.jit
def _gradients(grad, joined, out, rows, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    row, column, inside = _tile(rows, width, ROWS, COLUMNS)
    given = tl.load(grad + row * width + column, inside).to(tl.float32)
    gate = tl.load(joined + row * (2 * width) + column, inside).to(tl.float32)
    up = tl.load(joined + row * (2 * width) + width + column, inside).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    for_gate = given * up * sigmoid * (1 + gate * (1 - sigmoid))
    for_up = given * gate * sigmoid
    tl.store(out + row * (2 * width) + column, for_gate.to(out.dtype.element_ty), inside)
    tl.store(out + row * (2 * width) + width + column, for_up.to(out.dtype.element_ty), inside)

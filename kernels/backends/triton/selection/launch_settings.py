"""Rows, warps and stages of the kernels on a Selection, by dtype and head_dim; measured in docs/kernels.md."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class SelectedConfig:
    """rows: (query, head) pairs that a step computes. registers: a thread's limit."""

    rows: int
    warps: int
    stages: int
    registers: int | None = None
    bulk: bool = False
    """By key block: whether partial results are written by the copy engine (TMA), not by the threads. Backward with at
    least 2 stages: with 1, Triton 3.6 gave wrong gradients on an H200 (docs/kernels.md)."""
    turned: bool = False
    """Backward by key block: whether a step computes dQ^T, in one wgmma whatever the rows are, and turns it."""


@dataclass(frozen=True)
class SumConfig:
    """How slots are added up: rows a program, warps."""

    rows: int = 16
    warps: int = 4


# (kernel, bytes an element, padded head_dim) -> choice
_TABLE = {
    ("forward", 2, 64): SelectedConfig(128, 4, 2),
    ("forward", 2, 128): SelectedConfig(64, 4, 2, 168),
    ("forward", 2, 256): SelectedConfig(64, 4, 2),
    ("mass", 2, 64): SelectedConfig(128, 4, 2),
    ("mass", 2, 128): SelectedConfig(128, 4, 2),
    ("mass", 2, 256): SelectedConfig(64, 4, 2),
    ("backward", 2, 64): SelectedConfig(64, 4, 2),
    ("backward", 2, 128): SelectedConfig(32, 4, 3, None, True, True),
    ("backward", 2, 256): SelectedConfig(32, 8, 1),
    # float32 without tf32 runs on the ordinary units, and its products are unrolled: few rows.
    ("forward", 4, 64): SelectedConfig(32, 8, 1),
    ("forward", 4, 128): SelectedConfig(32, 8, 1),
    ("forward", 4, 256): SelectedConfig(16, 8, 1),
    ("mass", 4, 64): SelectedConfig(32, 8, 1),
    ("mass", 4, 128): SelectedConfig(32, 8, 1),
    ("mass", 4, 256): SelectedConfig(16, 8, 1),
    ("backward", 4, 64): SelectedConfig(16, 8, 1),
    ("backward", 4, 128): SelectedConfig(16, 8, 1),
    ("backward", 4, 256): SelectedConfig(16, 16, 1),
}


def choose(kernel: str, dtype: torch.dtype, head_dim: int) -> SelectedConfig:
    """The settings of `kernel`: "forward", "backward" or "mass"."""
    return _TABLE[kernel, dtype.itemsize, 64 if head_dim <= 64 else 128 if head_dim <= 128 else 256]


def choose_sum(head_dim: int) -> SumConfig:
    """How the slots are added up."""
    return SumConfig() if head_dim <= 128 else SumConfig(warps=8)

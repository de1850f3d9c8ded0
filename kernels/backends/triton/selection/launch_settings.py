"""Launch settings of the kernels for a Selection, by dtype and head_dim; measured in docs/kernels.md."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class SelectionConfig:
    """rows: (query, head) pairs per step. registers: the maximum per thread."""

    rows: int
    warps: int
    stages: int
    registers: int | None = None
    tma_store: bool = False
    """Whether TMA writes partial results, instead of ordinary stores. The backward pass then needs at least 2
    stages: with 1, Triton 3.6 gave wrong gradients on an H200 (docs/kernels.md)."""
    transposed: bool = False
    """Backward pass: whether a step computes dQ^T, which takes one wgmma for any number of rows, and transposes it."""


@dataclass(frozen=True)
class SumConfig:
    """Settings of `combine_slots`: rows per program, warps."""

    rows: int = 16
    warps: int = 4


# (kernel, bytes per element, padded head_dim) -> settings
_TABLE = {
    ("forward", 2, 64): SelectionConfig(128, 4, 2),
    ("forward", 2, 128): SelectionConfig(64, 4, 2, 168),
    ("forward", 2, 256): SelectionConfig(64, 4, 2),
    ("mass", 2, 64): SelectionConfig(128, 4, 2),
    ("mass", 2, 128): SelectionConfig(128, 4, 2),
    ("mass", 2, 256): SelectionConfig(64, 4, 2),
    ("backward", 2, 64): SelectionConfig(64, 4, 2),
    ("backward", 2, 128): SelectionConfig(32, 4, 3, None, True, True),
    ("backward", 2, 256): SelectionConfig(32, 8, 1),
    # float32 without tf32 does not run on tensor cores, and its products are unrolled: few rows.
    ("forward", 4, 64): SelectionConfig(32, 8, 1),
    ("forward", 4, 128): SelectionConfig(32, 8, 1),
    ("forward", 4, 256): SelectionConfig(16, 8, 1),
    ("mass", 4, 64): SelectionConfig(32, 8, 1),
    ("mass", 4, 128): SelectionConfig(32, 8, 1),
    ("mass", 4, 256): SelectionConfig(16, 8, 1),
    ("backward", 4, 64): SelectionConfig(16, 8, 1),
    ("backward", 4, 128): SelectionConfig(16, 8, 1),
    ("backward", 4, 256): SelectionConfig(16, 16, 1),
}


def choose(kernel: str, dtype: torch.dtype, head_dim: int) -> SelectionConfig:
    """The settings of `kernel`: "forward", "backward" or "mass"."""
    return _TABLE[kernel, dtype.itemsize, 64 if head_dim <= 64 else 128 if head_dim <= 128 else 256]


def choose_sum(head_dim: int) -> SumConfig:
    """The settings of `combine_slots`."""
    return SumConfig() if head_dim <= 128 else SumConfig(warps=8)

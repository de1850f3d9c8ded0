"""Launch settings of the dense kernels: queries and keys per step, warps and stages, by dtype and head_dim.

They were measured (docs/kernels.md) and are not tuned at run time, so that a run does not depend on the timings of a
tuner.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Config:
    """queries and keys: the part of a tile that one step computes, at most the block. registers: the maximum per
    thread."""

    queries: int
    keys: int
    warps: int
    stages: int
    registers: int | None = None

    def within(self, block: int) -> "Config":
        """These settings, limited to tiles of `block`."""
        queries, keys = min(self.queries, block), min(self.keys, block)
        if (queries, keys) == (self.queries, self.keys):
            return self
        warps = min(self.warps, 4, max(1, queries * keys // 1024))
        return Config(queries, keys, warps, self.stages, self.registers)


# (kernel, bytes per element, padded head_dim) -> settings
_TABLE = {
    ("forward", 2, 64): Config(128, 64, 4, 3),
    ("forward", 2, 128): Config(128, 64, 4, 2),
    ("forward", 2, 256): Config(128, 64, 8, 2),
    ("queries", 2, 64): Config(128, 64, 4, 2),
    ("queries", 2, 128): Config(128, 64, 8, 3),
    ("queries", 2, 256): Config(128, 64, 8, 1),
    ("keys", 2, 64): Config(64, 64, 4, 3),
    ("keys", 2, 128): Config(64, 64, 4, 2),
    ("keys", 2, 256): Config(64, 64, 8, 1),
    # float32 without tf32 does not run on tensor cores, and its products are unrolled: small tiles.
    ("forward", 4, 64): Config(32, 32, 8, 1),
    ("forward", 4, 128): Config(32, 32, 8, 1),
    ("forward", 4, 256): Config(16, 16, 8, 1),
    ("queries", 4, 64): Config(16, 32, 4, 1),
    ("queries", 4, 128): Config(16, 16, 8, 1),
    ("queries", 4, 256): Config(16, 16, 8, 1),
    ("keys", 4, 64): Config(16, 32, 8, 1),
    ("keys", 4, 128): Config(16, 16, 8, 1),
    ("keys", 4, 256): Config(16, 16, 16, 1),
}


def choose(kernel: str, dtype: torch.dtype, head_dim: int, block: int) -> Config:
    """The settings of `kernel`: "forward", "queries" (dQ) or "keys" (dK and dV)."""
    padded = 64 if head_dim <= 64 else 128 if head_dim <= 128 else 256
    return _TABLE[kernel, dtype.itemsize, padded].within(block)

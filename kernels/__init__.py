"""Sparse attention: pattern -> layout -> attention, on every backend. Knows nothing of models, data or training."""

from kernels import patterns
from kernels.attention import attention, merge
from kernels.axis import Axis
from kernels.builder import build_layout
from kernels.layout import BlockLayout

__all__ = ["Axis", "BlockLayout", "attention", "build_layout", "merge", "patterns"]

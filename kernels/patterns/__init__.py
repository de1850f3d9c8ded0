"""Patterns: rules that decide which keys a query may see. A new one is a class and a YAML in configs/attention."""

from kernels.patterns.base import Pattern
from kernels.patterns.block_sparse import BlockSparse
from kernels.patterns.dense import Dense
from kernels.patterns.hierarchical import Hierarchical
from kernels.patterns.routed import NativeSparse, Routed
from kernels.patterns.strided import Fixed, Strided
from kernels.patterns.window import Dilated, Window

__all__ = [
    "BlockSparse",
    "Dense",
    "Dilated",
    "Fixed",
    "Hierarchical",
    "NativeSparse",
    "Pattern",
    "Routed",
    "Strided",
    "Window",
]

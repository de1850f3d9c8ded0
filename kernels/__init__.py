"""Sparse attention: pattern -> layout -> attention, on every backend; independent of models, data and training."""

from kernels import patterns
from kernels.attention import attention
from kernels.layout.axis import Axis
from kernels.layout.block_layout import BlockLayout
from kernels.layout.builder import build_layout
from kernels.layout.selection import Selection
from kernels.selection.routing import block_means, document_starts, select
from kernels.selection.selected_attention import block_mass
from kernels.softmax import merge

__all__ = [
    "Axis",
    "BlockLayout",
    "Selection",
    "attention",
    "block_mass",
    "block_means",
    "build_layout",
    "document_starts",
    "merge",
    "patterns",
    "select",
]

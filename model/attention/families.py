"""Which family of attention serves which pattern."""

from collections.abc import Sequence

from kernels import Axis
from kernels.patterns import Hierarchical, NativeSparse, Pattern, Routed
from model.attention.base import AttentionCore, View
from model.attention.hierarchical import HierarchicalAttention
from model.attention.masked import MaskedAttention
from model.attention.native_sparse import NativeSparseAttention
from model.attention.routed import RoutedAttention

FAMILIES: dict[type[Pattern], type[AttentionCore]] = {
    Hierarchical: HierarchicalAttention,
    NativeSparse: NativeSparseAttention,  # before Routed, of which it is one
    Routed: RoutedAttention,
}
"""Patterns that are more than a mask over the tokens (`is_mask = False`) -> what attends by them."""


def core_class(pattern: Pattern | Sequence[Pattern]) -> type[AttentionCore]:
    """The family of a layer's pattern, or of its one pattern a KV head. ValueError: no family knows the pattern."""
    if not isinstance(pattern, Pattern) or pattern.is_mask:
        return MaskedAttention
    for pattern_class, attend in FAMILIES.items():
        if isinstance(pattern, pattern_class):
            return attend
    known = ", ".join(each.__name__ for each in FAMILIES)
    raise ValueError(f"pattern={pattern!r}: must be a mask over the tokens (is_mask), or one of {known}")


def build_view(pattern: Pattern | Sequence[Pattern], tokens: Axis, block: int, fixed: bool = False) -> View:
    """What attention under `pattern` needs of a batch of `tokens`, in tiles of `block`; `fixed` as in build_layout."""
    return core_class(pattern).build_view(pattern, tokens, block, fixed)

"""The registry of families: the attention core and the cache of every kind of pattern."""

from collections.abc import Sequence
from typing import NamedTuple

from kernels import Axis
from kernels.patterns import Hierarchical, NativeSparse, Pattern, Routed
from model.attention.base import AttentionCore, View
from model.attention.hierarchical.cache import HierarchicalCache
from model.attention.hierarchical.core import HierarchicalAttention
from model.attention.layer_cache import LayerCache
from model.attention.masked.cache import MaskedCache
from model.attention.masked.core import MaskedAttention
from model.attention.native_sparse.cache import NativeSparseCache
from model.attention.native_sparse.core import NativeSparseAttention
from model.attention.routed.cache import RoutedCache
from model.attention.routed.core import RoutedAttention


class Family(NamedTuple):
    """`core` computes attention, builds the layouts that it needs of a batch, and counts its cost; `cache` holds the
    keys and values of one layer during decoding (None: layers of this family cannot decode)."""

    core: type[AttentionCore]
    cache: type[LayerCache] | None = None


MASKS = Family(MaskedAttention, MaskedCache)
"""Serves every pattern with `is_mask`."""

FAMILIES: dict[type[Pattern], Family] = {
    Hierarchical: Family(HierarchicalAttention, HierarchicalCache),
    NativeSparse: Family(NativeSparseAttention, NativeSparseCache),
    Routed: Family(RoutedAttention, RoutedCache),
}
"""Class of pattern -> its family, for patterns that are no masks. A subclass has its nearest base class's family."""


def family_of(pattern: Pattern | Sequence[Pattern]) -> Family:
    """The family of a layer's pattern, or of its patterns, one per KV head. Raises ValueError if there is none."""
    if not isinstance(pattern, Pattern) or pattern.is_mask:
        return MASKS
    for pattern_class in type(pattern).__mro__:
        if pattern_class in FAMILIES:
            return FAMILIES[pattern_class]
    known = ", ".join(each.__name__ for each in FAMILIES)
    raise ValueError(f"pattern={pattern!r}: must be a mask over the tokens (is_mask), or one of {known}")


def build_view(pattern: Pattern | Sequence[Pattern], tokens: Axis, block: int, fixed: bool = False) -> View:
    """What attention under `pattern` needs of a batch of `tokens`, in tiles of `block`; `fixed` as in build_layout."""
    return family_of(pattern).core.build_view(pattern, tokens, block, fixed)

"""The registry of families: the attention core, the cache and the shard of every kind of pattern."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch.distributed as dist

from kernels import Axis
from kernels.patterns import Hierarchical, NativeSparse, Pattern, Routed
from model.attention.base import AttentionCore, AttentionLayout, DrawableLayout
from model.attention.hierarchical.cache import HierarchicalCache
from model.attention.hierarchical.core import HierarchicalAttention
from model.attention.hierarchical.shard import HierarchicalShard
from model.attention.layer_cache import LayerCache
from model.attention.masked.cache import MaskedCache
from model.attention.masked.core import MaskedAttention
from model.attention.masked.shard import MaskedShard
from model.attention.native_sparse.cache import NativeSparseCache
from model.attention.native_sparse.core import NativeSparseAttention
from model.attention.native_sparse.shard import NativeSparseShard
from model.attention.routed.cache import RoutedCache
from model.attention.routed.core import RoutedAttention
from model.attention.routed.shard import RoutedShard
from model.attention.sequence_shard import SequenceShard
from model.parallel.context import Context
from model.parallel.ranges import reach


class Family(NamedTuple):
    """`core` computes attention, builds the layouts that it needs of a batch, and counts its cost; `cache` holds the
    keys and values of one layer during decoding (None: layers of this family cannot decode); `shard` attends from one
    rank's tokens where several ranks share a sequence (None: they cannot)."""

    core: type[AttentionCore]
    cache: type[LayerCache] | None = None
    shard: type[SequenceShard] | None = None


MASKS = Family(MaskedAttention, MaskedCache, MaskedShard)
"""Serves every pattern with `is_mask`."""

FAMILIES: dict[type[Pattern], Family] = {
    Hierarchical: Family(HierarchicalAttention, HierarchicalCache, HierarchicalShard),
    NativeSparse: Family(NativeSparseAttention, NativeSparseCache, NativeSparseShard),
    Routed: Family(RoutedAttention, RoutedCache, RoutedShard),
}
"""Class of pattern -> its family, for patterns that are no masks. A subclass has its nearest base class's family."""


WITH_FAMILY = (
    "a mask over the tokens (is_mask), or a subclass of kernels.patterns."
    f"{', kernels.patterns.'.join(each.__name__ for each in FAMILIES)}"
)
"""The classes of patterns that `family_of` accepts, in words."""


def family_of(pattern: Pattern | Sequence[Pattern]) -> Family:
    """The family of a layer's pattern, or of its patterns, one per KV head. Raises ValueError if there is none."""
    if not isinstance(pattern, Pattern) or pattern.is_mask:
        return MASKS
    family = _registered(type(pattern))
    if family is not None:
        return family
    raise ValueError(f"pattern={pattern!r}: must be {WITH_FAMILY}")


def training_class(pattern_class: type[Pattern]) -> type | None:
    """The class of the settings that train the own parameters of a family; None: the family has no such settings."""
    family = _registered(pattern_class)
    return None if family is None else family.core.training_class


def _registered(pattern_class: type[Pattern]) -> Family | None:
    return next((FAMILIES[each] for each in pattern_class.__mro__ if each in FAMILIES), None)


def build_attention_layout(
    pattern: Pattern | Sequence[Pattern], tokens: Axis, block: int, fixed: bool = False
) -> DrawableLayout:
    """What attention under `pattern` needs of a batch of `tokens`, in tiles of `block`; `fixed` as in build_layout."""
    return family_of(pattern).core.build_layout(pattern, tokens, block, fixed)


def build_layouts(
    patterns: Sequence[Pattern | Sequence[Pattern]],
    tokens: Axis,
    block: int,
    fixed: bool = False,
    context: Context | None = None,
) -> list[AttentionLayout]:
    """The layouts of layers with these patterns; layers of one pattern share one. With a `context`, whose ranks share
    the sequences of `tokens`, they are shards: raises ValueError if a pattern's family has none."""
    layouts = {}
    for pattern in dict.fromkeys(patterns):
        if context is None:
            layouts[pattern] = build_attention_layout(pattern, tokens, block, fixed)
        else:
            layouts[pattern] = shard_of(pattern)(pattern, tokens, block, fixed, context)
    return [layouts[pattern] for pattern in patterns]


def shard_of(pattern: Pattern | Sequence[Pattern]) -> type[SequenceShard]:
    """The shard of a pattern's family. Raises ValueError if it has none."""
    shard = family_of(pattern).shard
    if shard is None:
        raise ValueError(f"pattern={pattern!r}: must be of a family with a shard, where ranks share a sequence")
    return shard


def shard_unit(patterns: Sequence[Pattern | Sequence[Pattern]], block: int, length: int) -> int:
    """Tokens of which each rank's part of sequences of `length` must be a multiple under these patterns."""
    return math.lcm(*(shard_of(pattern).unit(pattern, block, length) for pattern in patterns))


def share_sequences(
    patterns: Sequence[Pattern | Sequence[Pattern]], block: int, group: dist.ProcessGroup, length: int
) -> Context:
    """How the ranks of `group` share sequences of `length`, whose layers attend by `patterns`.

    The parts are interleaved, so that each rank has equal work, if some pattern sees the whole past and the families
    and the length permit it; else they are contiguous, so that little is sent for windows. Raises ValueError if a
    rank's part is not a multiple of `shard_unit`.
    """
    ranks, unit = group.size(), shard_unit(patterns, block, length)
    if length % (ranks * unit):
        raise ValueError(f"length={length}: must be a multiple of {ranks} ranks x {unit} tokens")
    sees_all = any(reach(pattern, length) is None for pattern in patterns)
    can_interleave = all(shard_of(pattern).can_interleave for pattern in patterns)
    return Context.of(group, length, sees_all and can_interleave and length % (2 * ranks * unit) == 0)

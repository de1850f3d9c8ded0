"""The attention of a layer: the projections, which all patterns share, and one folder for each family of patterns.

    layer.py         Attention: projections, norms, rotation and sinks, the same for every pattern
    base.py          AttentionCore, the base class: attention from projected queries, keys and values to outputs
    layer_cache.py   LayerCache, the base class: the keys and values of one layer during decoding
    sequence_shard.py    SequenceShard, the base class: attention where several ranks share a sequence
    families.py      the registry: pattern -> core, cache and shard
    reach.py         which past tokens can influence a token after some layers
    masked/ hierarchical/ routed/ native_sparse/     core.py, cache.py and shard.py of each family

To add a family: a pattern with `is_mask = False`, a folder with its core, cache and shard, and a line in families.py.
"""

from model.attention.base import AttentionCore, AttentionLayout, AttentionOutput, DrawableLayout, Inputs, Rotation
from model.attention.families import (
    WITH_FAMILY,
    Family,
    build_attention_layout,
    build_layouts,
    family_of,
    shard_unit,
    share_sequences,
    training_class,
)
from model.attention.layer import Attention
from model.attention.layer_cache import LayerCache
from model.attention.sequence_shard import SequenceShard

__all__ = [
    "WITH_FAMILY",
    "Attention",
    "AttentionCore",
    "AttentionLayout",
    "AttentionOutput",
    "DrawableLayout",
    "Family",
    "Inputs",
    "LayerCache",
    "Rotation",
    "SequenceShard",
    "build_attention_layout",
    "build_layouts",
    "family_of",
    "shard_unit",
    "share_sequences",
    "training_class",
]

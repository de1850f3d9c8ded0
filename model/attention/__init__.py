"""The attention of a layer: the projections, which all patterns share, and one folder for each family of patterns.

    layer.py         Attention: projections, norms, rotation and sinks, the same for every pattern
    base.py          AttentionCore, the base class: attention from projected queries, keys and values to outputs
    layer_cache.py   LayerCache, the base class: the keys and values of one layer during decoding
    families.py      the registry: pattern -> core and cache
    reach.py         which past tokens can influence a token after some layers
    masked/ hierarchical/ routed/ native_sparse/     core.py and cache.py of each family

To add a family: a pattern with `is_mask = False`, a folder with its core and its cache, and a line in families.py.
"""

from model.attention.base import AttentionCore, AttentionOutput, Inputs, Rotation, View
from model.attention.families import Family, build_view, family_of
from model.attention.layer import Attention
from model.attention.layer_cache import LayerCache

__all__ = [
    "Attention",
    "AttentionCore",
    "AttentionOutput",
    "Family",
    "Inputs",
    "LayerCache",
    "Rotation",
    "View",
    "build_view",
    "family_of",
]

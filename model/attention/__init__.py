"""The attention of a layer: the projections, which all patterns share, and what differs by pattern.

    layer.py       Attention: queries, keys, values and output, norms, rotation, sinks   (one class for every pattern)
    base.py        Inputs, AttentionCore: what lies between projections and output; View: what it needs of a batch
    masked.py      masks over the tokens: one call of kernels.attention
    hierarchical.py, pooling.py    tokens and pooled summaries in one call
    routed.py, indexer.py          a window and the blocks that a router picks; the learned router and its loss
    native_sparse.py               these and summaries: NSA's three branches
    families.py    which AttentionCore serves which pattern
    reach.py       which past tokens can influence a token after some layers

To add a family: a pattern with `is_mask = False`, an AttentionCore of its own, and a line in families.py.
"""

from model.attention.base import AttentionCore, AttentionOutput, Inputs, Rotation, View
from model.attention.families import build_view, core_class
from model.attention.layer import Attention

__all__ = ["Attention", "AttentionCore", "AttentionOutput", "Inputs", "Rotation", "View", "build_view", "core_class"]

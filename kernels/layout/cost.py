"""What a layout costs: visible pairs, executed tiles, FLOPs and bytes, all counted exactly on the layout itself."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from kernels.layout.block_layout import BlockLayout
from kernels.patterns.base import Pattern
from kernels.patterns.hierarchical import Hierarchical, Summaries
from kernels.patterns.routed import NativeSparse, Routed

FORWARD_FLOPS = 4
"""FLOPs a visible pair, head and head_dim in the forward pass: q·k and p·v, a multiplication and an addition each."""

BACKWARD_FLOPS = 10
"""FLOPs that a backward kernel executes: five products, the recomputed scores included (Dao 2023)."""

TRAINING_FLOPS = 3 * FORWARD_FLOPS
"""FLOPs that training needs, forward and backward, recomputation not counted (the convention of MFU, Chowdhery et al.
2022)."""


@dataclass(frozen=True)
class AttentionCost:
    """Counts of one attention call, or of several added up. A pair is one (query, key, query head, sequence)."""

    visible_pairs: int
    tile_pairs: int
    """Pairs in all listed tiles: what a tile kernel computes. Visible pairs are what they had to."""
    causal_pairs: int
    """Pairs of dense causal attention on the same axes, documents ignored: what densities are relative to."""
    flops: int
    """Training FLOPs (forward and backward) over visible pairs."""

    def __add__(self, other: "AttentionCost") -> "AttentionCost":
        return AttentionCost(*(a + b for a, b in zip(vars(self).values(), vars(other).values(), strict=True)))

    @property
    def density_pairs(self) -> float:
        return self.visible_pairs / self.causal_pairs

    @property
    def density_tiles(self) -> float:
        return self.tile_pairs / self.causal_pairs


def attention_cost(layout: BlockLayout, batch: int, heads: int, head_dim: int) -> AttentionCost:
    """The cost of `attention()` with `batch` sequences and `heads` query heads under `layout`."""
    repeat = (batch // layout.batch) * (heads // layout.heads)
    visible = int(layout.pairs.sum()) * repeat
    tiles = int(layout.rows.count.sum()) * layout.block**2 * repeat
    flops = TRAINING_FLOPS * head_dim * visible
    return AttentionCost(visible, tiles, causal_pairs(layout.queries, layout.keys) * batch * heads, flops)


@dataclass(frozen=True)
class DecodeCost:
    """Keys of one layer, KV head and sequence: `stored` in a cache, and `read` by the next query, its own aside. A key
    comes with its value. A router's keys, one a block, come on top: `router_stored`, `router_read`."""

    stored: int
    read: int
    router_stored: int = 0
    router_read: int = 0


def decode_cost(pattern: Pattern | Sequence[Pattern], context: int, group: int = 1) -> DecodeCost:
    """What the token behind `context` others costs, under a pattern or one pattern a KV head (which share a cache).

    Stored: what lies within the pattern's horizon, and what lasts (Pattern.lasting; twice, where it is both). Read:
    what any of the patterns lets the query see; to read no more than that is up to the cache. Under Hierarchical, the
    summaries of every level are keys. Under Routed, read are the window, the picked blocks (of each of the `group`
    query heads of a KV head, where they pick alone), and the router's key of every block that can be picked.
    """
    if isinstance(pattern, Hierarchical):
        levels = [_decode_cost((level,), context, level.span) for level in pattern.levels]
        return DecodeCost(sum(each.stored for each in levels), sum(each.read for each in levels))
    if isinstance(pattern, Routed):
        window = _decode_cost((pattern.local,), context, span=1)
        eligible = max(0, (context - (pattern.window - 1)) // pattern.block)
        picked = min(pattern.slots, eligible) * pattern.block * (group if pattern.share == "head" else 1)
        stored, read = window.stored, window.read + picked
        if isinstance(pattern, NativeSparse):
            summaries = _decode_cost((Summaries(pattern.summary_span),), context, pattern.summary_span)
            stored, read = stored + summaries.stored, read + summaries.read
        return DecodeCost(stored, read, context // pattern.block, eligible)
    return _decode_cost((pattern,) if isinstance(pattern, Pattern) else tuple(pattern), context, span=1)


def _decode_cost(patterns: tuple[Pattern, ...], context: int, span: int) -> DecodeCost:
    horizons = [each.horizon for each in patterns]
    key = torch.arange(context // span) * span
    lasting = torch.stack([each.lasting(key) for each in patterns]).any(0)
    recent = 0 if None in horizons else min((max(horizons) - 1) // span, len(key))
    query = torch.tensor(context)
    seen = torch.stack([each.visible(query, key, key + span).expand(len(key)) for each in patterns]).any(0)
    return DecodeCost(len(key) if None in horizons else recent + int(lasting.sum()), int(seen.sum()))


def causal_pairs(queries: int, keys: int) -> int:
    """Pairs where the last query sees every key and each earlier one sees one key less."""
    seen_by_first = max(keys - queries + 1, 0)
    return (seen_by_first + keys) * min(queries, keys) // 2 if keys >= queries else keys * (keys + 1) // 2


def layout_bytes(layout: BlockLayout) -> int:
    """Bytes of the layout's tensors: the metadata that a kernel reads beside q, k and v."""
    return sum(t.numel() * t.element_size() for t in layout.tensors())

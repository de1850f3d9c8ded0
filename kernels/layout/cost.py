"""Cost of a layout: visible pairs, executed tiles, FLOPs and bytes, counted exactly on the layout."""

from collections.abc import Sequence
from dataclasses import dataclass

from kernels.patterns.base import DecodeCost, Pattern, keys_of_masks

FORWARD_FLOPS = 4
"""FLOPs per visible pair, head and head_dim in the forward pass: q·k and p·v, a multiplication and an addition each."""

BACKWARD_FLOPS = 10
"""FLOPs that a backward kernel executes per visible pair, head and head_dim: five products, the recomputed scores
included (Dao 2023)."""

TRAINING_FLOPS = 3 * FORWARD_FLOPS
"""FLOPs per visible pair, head and head_dim that training needs, without recomputation (the convention of MFU,
Chowdhery et al. 2022)."""


@dataclass(frozen=True)
class AttentionCost:
    """Counts of one attention call, or of several added up. A pair is one (query, key, query head, sequence)."""

    visible_pairs: int
    tile_pairs: int
    """Pairs in all listed tiles, which a tile kernel computes; `visible_pairs` is the minimum needed."""
    causal_pairs: int
    """Pairs of dense causal attention on the same axes, documents ignored; the denominator of densities."""
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


def decode_cost(pattern: Pattern | Sequence[Pattern], context: int, group: int = 1) -> DecodeCost:
    """As Pattern.decode_cost, also for one pattern per KV head, each a mask over the tokens."""
    return (
        pattern.decode_cost(context, group) if isinstance(pattern, Pattern) else keys_of_masks(pattern, context, span=1)
    )


def causal_pairs(queries: int, keys: int) -> int:
    """Number of pairs in which the last query sees every key and each earlier query one key fewer."""
    seen_by_first = max(keys - queries + 1, 0)
    return (seen_by_first + keys) * min(queries, keys) // 2 if keys >= queries else keys * (keys + 1) // 2

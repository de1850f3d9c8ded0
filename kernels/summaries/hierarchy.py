"""The keys of hierarchical attention: tokens and levels of summaries on one key axis, with its layout."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.layout.axis import Axis
from kernels.layout.block_layout import BlockLayout, Source
from kernels.layout.builder import build_layout
from kernels.layout.concatenate import concatenate, concatenate_axes, concatenate_keys
from kernels.layout.cost import AttentionCost, causal_pairs
from kernels.layout.lru_cache import LRUCache
from kernels.patterns.hierarchical import Hierarchical, Summaries


@dataclass(frozen=True, eq=False)
class Level:
    """The keys of one level: tokens (span 1) or summaries of `span` tokens each."""

    span: int
    axis: Axis
    pairs: Tensor
    """int64 `[batch, 1]`: visible (query, key) pairs of this level."""
    intervals: Tensor
    """int32 `[batch, 3, entries of axis]`: the axis's start, end and origin, an argument of `join_summaries`."""

    @property
    def name(self) -> str:
        return "tokens" if self.span == 1 else f"summaries of {self.span}"


@dataclass(frozen=True, eq=False)
class Hierarchy:
    """All levels, in the order of their keys in `layout`. Levels whose span exceeds the sequence are left out."""

    levels: tuple[Level, ...]
    layout: BlockLayout

    @property
    def batch(self) -> int:
        return self.layout.batch

    @property
    def queries(self) -> int:
        return self.layout.queries

    @property
    def overflow(self) -> Tensor | None:
        return self.layout.overflow

    def join(self, tensors: Sequence[Tensor]) -> Tensor:
        """Concatenates the keys (or values) of all levels, `[batch, kv_heads, keys, head_dim]` each, for `layout`."""
        return concatenate_keys(tensors, self.layout.block)

    def cost(self, batch: int, heads: int, head_dim: int) -> AttentionCost:
        """The cost of attention; densities are relative to causal attention over the tokens, not over this key axis.

        Pooling is not counted; it costs about as much as one or two visible pairs per token and KV head.
        """
        causal = causal_pairs(self.queries, self.queries) * batch * heads
        return dataclasses.replace(self.layout.cost(batch, heads, head_dim), causal_pairs=causal)

    def parts(self) -> dict[str, int]:
        """Visible pairs of each level, for one head, summed over the layout's sequences."""
        return {level.name: int(level.pairs.sum()) for level in self.levels}

    def token_masks(self) -> list[tuple[Tensor, float]]:
        """One (booleans `[queries, tokens]`, shade) per level, for a picture of the first sequence.

        A visible summary marks all tokens of its span. The shade halves from level to level.
        """
        visible, masks, first_key = self.layout.dense_mask()[0, 0], [], 0
        for step, level in enumerate(self.levels):
            keys = visible[:, first_key : first_key + level.axis.length]
            first_key += -(-level.axis.length // self.layout.block) * self.layout.block
            first = (level.axis.origin + level.axis.start)[0].long()
            mask = torch.zeros(self.queries, self.queries + level.span, dtype=torch.bool, device=visible.device)
            for offset in range(level.span):  # empty entries are never visible and mark no token
                mask[:, first + offset] |= keys
            masks.append((mask[:, : self.queries], 0.5**step))
        return masks


def build_hierarchy(
    pattern: Hierarchical | Sequence[Summaries],
    tokens: Axis,
    block: int = 128,
    *,
    fixed: bool = False,
    queries: Axis | None = None,
    token_keys: Axis | None = None,
) -> Hierarchy:
    """The hierarchy of `pattern`, or of any disjoint levels from fine to coarse, of all spans of `tokens`.

    queries, token_keys: ranges of `tokens` (Axis.take): the queries, and the keys of the level of tokens; None: all
    tokens. Without packed documents and ranges, the result is cached by its settings. With documents, the number of
    keys depends on the length alone; with `fixed`, so does every other size (see build_layout). Raises ValueError if
    every level's span exceeds the sequence, or if `tokens` does not start at position 0.
    """
    pattern = pattern if isinstance(pattern, Hierarchical) else tuple(pattern)
    levels = _levels(pattern)
    if all(level.span > tokens.length for level in levels):
        raise ValueError(f"span={levels[0].span}: must be at most the sequence's length, {tokens.length}")
    if tokens.key not in (None, ("tokens", tokens.length, 0)):
        raise ValueError(f"tokens={tokens.key}: must start at position 0")
    if tokens.key is None or queries is not None:
        return _build(pattern, tokens, queries or tokens, token_keys or tokens, block, fixed)

    def build() -> Hierarchy:
        with torch.inference_mode(False):  # a hierarchy that validation builds is reused in training
            whole = Axis.tokens(tokens.length, device=tokens.device)
            return _build(pattern, whole, whole, whole, block, fixed=False)

    return _cache.get((pattern, tokens.length, block, tokens.device), build)


_cache: LRUCache[Hierarchy] = LRUCache(size=32)


def _build(
    pattern: Hierarchical | tuple[Summaries, ...],
    tokens: Axis,
    queries: Axis,
    token_keys: Axis,
    block: int,
    fixed: bool,
) -> Hierarchy:
    built, layouts = [], []
    for level in _levels(pattern):
        if level.span > tokens.length:
            continue
        axis = token_keys if level.span == 1 else Axis.summaries(tokens, level.span)
        layouts.append(build_layout(level, queries, axis, block, fixed=fixed))
        intervals = torch.stack([axis.start, axis.end, axis.origin], 1)
        built.append(Level(level.span, axis, layouts[-1].pairs, intervals))
    layout = concatenate(layouts)
    if isinstance(pattern, Hierarchical):  # one pattern describes the keys of all levels
        keys = concatenate_axes([level.axis for level in built], block)
        layout = dataclasses.replace(layout, source=Source((pattern,), queries, keys))
    return Hierarchy(tuple(built), layout)


def _levels(pattern: Hierarchical | tuple[Summaries, ...]) -> tuple[Summaries, ...]:
    return pattern.levels if isinstance(pattern, Hierarchical) else pattern

"""Tokens and levels of summaries on one key axis: what attention under Hierarchical needs of a batch."""

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
from kernels.layout.lru_cache import RecentlyUsed
from kernels.patterns.hierarchical import Hierarchical, Summaries


@dataclass(frozen=True, eq=False)
class Level:
    """One level's keys: tokens (span 1) or the summaries of `span` tokens each."""

    span: int
    axis: Axis
    pairs: Tensor
    """int64 `[batch, 1]`: visible (query, key) pairs of this level."""
    places: Tensor
    """int32 `[batch, 3, slots]`: the axis's start, end and origin, as `join_summaries` takes them."""

    @property
    def name(self) -> str:
        return "tokens" if self.span == 1 else f"summaries of {self.span}"


@dataclass(frozen=True, eq=False)
class Hierarchy:
    """The levels, in the order in which `layout` has their keys; those too coarse for the sequence are left out."""

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

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """The keys (or values) of all levels, `[batch, kv_heads, keys, head_dim]` each, as `layout` wants them."""
        return concatenate_keys(parts, self.layout.block)

    def cost(self, batch: int, heads: int, head_dim: int) -> AttentionCost:
        """The attention's cost; densities are relative to causal attention over the tokens, not over this key axis.

        Making the summaries is not counted: about as much as one or two pairs a token and KV head.
        """
        causal = causal_pairs(self.queries, self.queries) * batch * heads
        return dataclasses.replace(self.layout.cost(batch, heads, head_dim), causal_pairs=causal)

    def parts(self) -> dict[str, int]:
        """Visible pairs on each level, of one head, over the sequences of the layout."""
        return {level.name: int(level.pairs.sum()) for level in self.levels}

    def token_masks(self) -> list[tuple[Tensor, float]]:
        """For pictures, of the first sequence: booleans `[queries, tokens]` of each level, a summary's pair painted
        over the tokens that it stands for, and how dark to paint them: by half from level to level."""
        dense, painted, begin = self.layout.dense_mask()[0, 0], [], 0
        for step, level in enumerate(self.levels):
            keys = dense[:, begin : begin + level.axis.length]
            begin += -(-level.axis.length // self.layout.block) * self.layout.block
            first = (level.axis.origin + level.axis.start)[0].long()
            mask = torch.zeros(self.queries, self.queries + level.span, dtype=torch.bool, device=dense.device)
            for offset in range(level.span):  # an empty slot's tokens are painted with nothing: it is never seen
                mask[:, first + offset] |= keys
            painted.append((mask[:, : self.queries], 0.5**step))
        return painted


def build_hierarchy(
    pattern: Hierarchical | Sequence[Summaries], tokens: Axis, block: int = 128, *, fixed: bool = False
) -> Hierarchy:
    """The hierarchy of `pattern`, or of any disjoint levels from fine to coarse, for queries that are `tokens`.

    Without packed documents it is cached by its settings. With them, the numbers of keys follow from the length alone;
    `fixed`: so does every other size (see build_layout).
    ValueError: no level has a key in so short a sequence, or queries that don't start at 0.
    """
    pattern = pattern if isinstance(pattern, Hierarchical) else tuple(pattern)
    levels = _levels(pattern)
    if all(level.span > tokens.length for level in levels):
        raise ValueError(f"span={levels[0].span}: must be at most the sequence's length, {tokens.length}")
    if tokens.key not in (None, ("tokens", tokens.length, 0)):
        raise ValueError(f"tokens={tokens.key}: summaries are made of tokens from position 0 on")
    if tokens.key is None:
        return _build(pattern, tokens, block, fixed)

    def build() -> Hierarchy:
        with torch.inference_mode(False):  # what validation builds must serve training, too
            return _build(pattern, Axis.tokens(tokens.length, device=tokens.device), block, fixed=False)

    return _cache.get((pattern, tokens.length, block, tokens.device), build)


_cache: RecentlyUsed[Hierarchy] = RecentlyUsed(size=32)


def _build(pattern: Hierarchical | tuple[Summaries, ...], tokens: Axis, block: int, fixed: bool) -> Hierarchy:
    built, layouts = [], []
    for level in _levels(pattern):
        if level.span > tokens.length:
            continue
        axis = tokens if level.span == 1 else Axis.summaries(tokens, level.span)
        layouts.append(build_layout(level, tokens, axis, block, fixed=fixed))
        places = torch.stack([axis.start, axis.end, axis.origin], 1)
        built.append(Level(level.span, axis, layouts[-1].pairs, places))
    layout = concatenate(layouts)
    if isinstance(pattern, Hierarchical):  # one rule for all of its keys, whatever they stand for
        keys = concatenate_axes([level.axis for level in built], block)
        layout = dataclasses.replace(layout, source=Source((pattern,), tokens, keys))
    return Hierarchy(tuple(built), layout)


def _levels(pattern: Hierarchical | tuple[Summaries, ...]) -> tuple[Summaries, ...]:
    return pattern.levels if isinstance(pattern, Hierarchical) else pattern

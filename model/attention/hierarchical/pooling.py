"""Pools the keys and values of a span into one summary, and gives the summary a position.

Keys are pooled *before* the rotation, and the summary gets the rotation of the token in the middle of its span. Rotated
keys with the same content point in different directions at different positions, so their mean would cancel in the fast
frequencies and keep a position in the slow ones alone.

Each level is pooled from the summaries of the next finer level, so all levels together cost about as much as the first.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from kernels.summaries.hierarchy import Hierarchy, Level
from kernels.summaries.join_summaries import can_join, join_summaries
from kernels.summaries.span_pooling import middles, pool
from model.attention.base import Rotation
from model.config import ModelConfig
from model.rope import rotate


class SummaryPool(nn.Module):
    """Computes the summaries of all levels; `spans`: tokens per summary of each level, from fine to coarse.

    "mean" has no parameters. "learned" is an attention pool with one query per level and KV head: the score of a key is
    its product with the query, and the softmax of the scores within a span gives the weights of its keys and values.
    The queries are initialized to zero, which gives the mean."""

    def __init__(self, spans: Sequence[int], pooling: str, config: ModelConfig) -> None:
        super().__init__()
        self.spans = list(spans)
        shape = (len(self.spans), config.kv_heads, config.head_dim)
        self.query = nn.Parameter(torch.zeros(shape)) if pooling == "learned" else None

    def forward(
        self, unrotated_k_BTKD: Tensor, v_BTKD: Tensor, rotation: Rotation, levels: Sequence[Level]
    ) -> list[tuple[Tensor, Tensor]]:
        """Returns (keys, values) of every level, `[batch, kv_heads, summaries, head_dim]` each. `levels`: the first of
        `spans`; a short sequence lacks the coarsest levels."""
        dtype, unit, summaries = v_BTKD.dtype, 1, []
        keys, values = unrotated_k_BTKD, v_BTKD
        for i, level in enumerate(levels):
            keys, values = pool(keys, values, self.scores(i, keys), level.axis, level.span, unit)
            unit = level.span
            index = middles(level.axis, level.span)[..., None, None]
            turned = rotate(keys, *(torch.take_along_dim(each, index, 1) for each in rotation))
            summaries.append((turned.to(dtype).transpose(1, 2), values.to(dtype).transpose(1, 2)))
        return summaries

    def join(
        self,
        hierarchy: Hierarchy,
        k_BTKD: Tensor | None,
        unrotated_k_BTKD: Tensor,
        v_BTKD: Tensor,
        rotation: Rotation,
        backend: str,
    ) -> tuple[Tensor, Tensor]:
        """Returns (keys, values) `[batch, kv_heads, keys, head_dim]` of all levels of `hierarchy`, in the order of its
        layout. k_BTKD: rotated keys of the tokens; None if tokens are not a level. backend: that of attention. On a GPU
        one operator computes everything."""
        if can_join(v_BTKD, backend):
            return join_summaries(hierarchy, k_BTKD, unrotated_k_BTKD, v_BTKD, self.query, rotation)
        levels = [level for level in hierarchy.levels if level.span > 1]
        parts = self(unrotated_k_BTKD, v_BTKD, rotation, levels)
        if k_BTKD is not None:
            parts = [(k_BTKD.transpose(1, 2), v_BTKD.transpose(1, 2)), *parts]
        keys, values = zip(*parts, strict=True)
        return hierarchy.join(keys), hierarchy.join(values)

    def scores(self, level: int, keys: Tensor) -> Tensor | None:
        """Scores `[..., kv_heads]`, before the softmax, of keys `[..., kv_heads, head_dim]` in their summaries on this
        level (0 is the finest). None: all keys have equal weights."""
        if self.query is None:
            return None
        dtype = torch.float64 if keys.dtype == torch.float64 else torch.float32
        return (keys * self.query[level].to(dtype)).sum(-1)  # bfloat16 x float32 is float32, without a copy

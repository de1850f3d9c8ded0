"""How a span's keys and values become one summary, and where that summary is said to stand.

Keys are pooled *before* the rotation, and the summary is rotated as the token in the middle of its span would be.
Rotated keys of one content point in as many directions as they have positions: their mean would cancel in the fast
frequencies, and the slow ones be left alone to say where it is.

A level is pooled from the summaries of the finer one, so that all levels together cost about as much as the first.
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
    """Makes the summaries of levels whose spans are `spans`, from fine to coarse.

    "mean" has no parameters. "learned" is an attention pool with one query a level and KV head: a key's score is its
    product with the query, weights are the scores' softmax within the span, and both keys and values are pooled by
    them. Queries begin at zero, which is the mean.
    """

    def __init__(self, spans: Sequence[int], pooling: str, config: ModelConfig) -> None:
        super().__init__()
        self.spans = list(spans)
        shape = (len(self.spans), config.kv_heads, config.head_dim)
        self.query = nn.Parameter(torch.zeros(shape)) if pooling == "learned" else None

    def forward(
        self, unrotated_k_BTKD: Tensor, v_BTKD: Tensor, rotation: Rotation, levels: Sequence[Level]
    ) -> list[tuple[Tensor, Tensor]]:
        """(keys, values), `[batch, kv_heads, slots, head_dim]` each, of every level; `levels` are the first of `spans`
        (a short sequence lacks the coarsest)."""
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
        """(keys, values) `[batch, kv_heads, keys, head_dim]` of all levels of `hierarchy`, as its layout wants them;
        k is None where tokens are none of them. backend: attention's. On a GPU all of it is one operator."""
        if can_join(v_BTKD, backend):
            return join_summaries(hierarchy, k_BTKD, unrotated_k_BTKD, v_BTKD, self.query, rotation)
        levels = [level for level in hierarchy.levels if level.span > 1]
        parts = self(unrotated_k_BTKD, v_BTKD, rotation, levels)
        if k_BTKD is not None:
            parts = [(k_BTKD.transpose(1, 2), v_BTKD.transpose(1, 2)), *parts]
        keys, values = zip(*parts, strict=True)
        return hierarchy.join(keys), hierarchy.join(values)

    def scores(self, level: int, keys: Tensor) -> Tensor | None:
        """How much each of the keys `[..., kv_heads, head_dim]` weighs in its summary on this level, from 0:
        `[..., kv_heads]` before the softmax; None where all weigh alike."""
        if self.query is None:
            return None
        dtype = torch.float64 if keys.dtype == torch.float64 else torch.float32
        return (keys * self.query[level].to(dtype)).sum(-1)  # bfloat16 x float32 is float32, without a copy

"""The share of dense attention that lies at each distance: octaves of 1, 1, 2, 4, 8, ... tokens."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from kernels.patterns import Pattern
from model.attention import Attention, Rotation


def octave_edges(longest: int) -> list[int]:
    """Returns the edges of the octaves of distances below `longest`: 0, 1, 2, 4, ... tokens."""
    return [0, *(2**i for i in range((longest - 1).bit_length() + 1))]


def near_distance(pattern: Pattern, longest: int) -> int:
    """Returns the first edge of the octaves beyond the pattern's nearest edge (a window's width); at most the start of
    the last octave."""
    *starts, _ = octave_edges(longest)
    return next((start for start in starts if start >= min(pattern.edges, default=longest)), starts[-1])


def mass_by_distance(
    attention: Attention,
    x: Tensor,
    rotation: Rotation,
    sizes: Sequence[int],
    queries: Sequence[np.ndarray],
    longest: int,
) -> Tensor:
    """Returns the share of attention weight by distance, float32 or float64 `[kv_heads, octaves]`: the mean over chunks
    of the mean over their sampled queries and the query heads of a KV head. A learned sink takes the rest.

    Only the scores of the sampled queries are computed.

    Args:
        x: the normalized input of the layer `[1, tokens, width]`: chunks of `sizes` tokens side by side.
        queries: positions of the sampled queries in each chunk.
        longest: number of tokens of the longest chunk of all, which determines the octaves.
    """
    q_BHTD, k_BKTD, *_ = attention.project(x, rotation)
    dtype = torch.promote_types(q_BHTD.dtype, torch.float32)
    group = attention.heads // attention.kv_heads
    octaves = len(octave_edges(longest)) - 1
    mass = torch.zeros(attention.kv_heads, octaves, dtype=dtype, device=x.device)
    start = 0
    with torch.autocast(x.device.type, enabled=False):
        for size, positions in zip(sizes, queries, strict=True):
            position = torch.from_numpy(positions).to(x.device)
            distance = position[:, None] - torch.arange(size, device=x.device)
            octave = torch.frexp(distance.clamp(min=0).double()).exponent.long()  # 0, 1, 2, 2, 3, ... of 0, 1, 2, 3, 4
            for head in range(attention.kv_heads):
                q_GSD = q_BHTD[0, head * group : (head + 1) * group, start + position].to(dtype)
                k_TD = k_BKTD[0, head, start : start + size].to(dtype)
                scores = (q_GSD @ k_TD.T * attention.head_dim**-0.5).masked_fill(distance < 0, -torch.inf)
                if attention.sink_logits is not None:
                    sinks = attention.sink_logits[head * group : (head + 1) * group, None, None].to(dtype)
                    scores = torch.cat([scores, sinks.expand(-1, len(position), 1)], -1)
                weights = scores.softmax(-1)[..., :size].mean(0)
                by_query = torch.zeros(len(position), octaves, dtype=dtype, device=x.device)
                mass[head] += by_query.scatter_add(1, octave, weights).mean(0)
            start += size
    return mass / len(sizes)

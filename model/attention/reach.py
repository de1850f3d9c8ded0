"""The reach of a plan: which past tokens can influence a token after some layers, along any path through them.

The state of a token depends on the token itself (the residual stream) and on the tokens that it attends to. With M_l
the mask of layer l including its diagonal, the states after layer l depend on the boolean product M_l M_(l-1) ... M_1.
This is exact, pair by pair, on one document.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels import Axis
from model.attention.families import build_attention_layout
from model.config import AttentionPlan


@dataclass(frozen=True)
class Depth:
    """The reach after `layers` layers.

    share: fraction of all causal pairs that some path connects.
    influences: number of past tokens on which the last token's state depends.
    furthest: distance in tokens to the furthest of them.
    """

    layers: int
    pattern: str
    share: float
    influences: int
    furthest: int


def layer_mask(plan: AttentionPlan, layer: int, length: int) -> tuple[str, Tensor]:
    """Returns (name, bool `[length, length]`): the pairs of one document that any head of a layer may attend to.

    Tokens in a summary count as visible, and so does every block that a router may choose.
    """
    entry = plan.entry(layer)
    pattern = plan.pattern(layer, kv_heads=1 if isinstance(entry, str) else len(entry))
    layout = build_attention_layout(pattern, Axis.tokens(length), plan.block)
    masks = [mask for mask, _ in layout.token_masks()]
    return entry if isinstance(entry, str) else "+".join(entry), torch.stack(masks).any(0)


def reach_by_depth(plan: AttentionPlan, layers: int, length: int) -> tuple[list[Depth], Tensor]:
    """Returns (one Depth per layer, bool `[length, length]`: the tokens on which the last layer's states depend)."""
    connected = torch.eye(length, dtype=torch.bool)
    causal = length * (length + 1) // 2
    depths, masks = [], {}
    for layer in range(layers):
        entry = plan.entry(layer)
        if entry not in masks:
            masks[entry] = layer_mask(plan, layer, length)
        name, mask = masks[entry]
        if not depths or depths[-1].share < 1:  # more layers disconnect nothing
            connected = product(mask | torch.eye(length, dtype=torch.bool), connected)
        (past,) = connected[-1].nonzero(as_tuple=True)
        share = float(connected.sum(dtype=torch.int64)) / causal
        depths.append(Depth(layer + 1, name, share, len(past) - 1, length - 1 - int(past[0])))
    return depths, connected


def product(first: Tensor, second: Tensor) -> Tensor:
    """Returns the boolean matrix product. Its counts are exact in float32 up to 2^24."""
    return first.float() @ second.float() > 0


def unreached(connected: Tensor) -> int:
    """Returns how many causal pairs no path connects."""
    length = len(connected)
    return length * (length + 1) // 2 - int(connected.sum(dtype=torch.int64))


def union_density(masks: Sequence[Tensor]) -> float:
    """Returns the fraction of causal pairs that at least one of the masks contains."""
    length = masks[0].shape[0]
    return float(torch.stack(list(masks)).any(0).sum(dtype=torch.int64)) / (length * (length + 1) // 2)

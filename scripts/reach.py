"""How far information can travel: after one layer to what its pattern sees, after more along every path of layers.

A token's state holds itself and what it attended to; so with M a layer's mask and its diagonal (the residual stream),
what layer l's states may know of is the boolean product M_l M_(l-1) ... M_1: exact, pair by pair, on one document.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels import Axis
from model import AttentionPlan
from model.attention import build_view


@dataclass(frozen=True)
class Depth:
    """After so many `layers`: the share of all causal pairs that some path connects, and for the last token how many
    past tokens it can know of, and how far back the furthest is."""

    layers: int
    pattern: str
    share: float
    last_knows: int
    furthest: int


def layer_mask(plan: AttentionPlan, layer: int, length: int) -> tuple[str, Tensor]:
    """(name, booleans `[length, length]`): what any head of a layer may see of one document's tokens, in summaries
    included. Of a router's blocks: all that it may pick."""
    entry = plan.schedule[layer % len(plan.schedule)]
    pattern = plan.pattern(layer, kv_heads=1 if isinstance(entry, str) else len(entry))
    view = build_view(pattern, Axis.tokens(length), plan.block)
    masks = [mask for mask, _ in view.token_masks()]
    return entry if isinstance(entry, str) else "+".join(entry), torch.stack(masks).any(0)


def reach_by_depth(plan: AttentionPlan, layers: int, length: int) -> tuple[list[Depth], Tensor]:
    """(one Depth a layer, booleans `[length, length]`: what the last layer's states may know of)."""
    known = torch.eye(length, dtype=torch.bool)
    causal = length * (length + 1) // 2
    depths, masks = [], {}
    for layer in range(layers):
        place = layer % len(plan.schedule)
        if place not in masks:
            masks[place] = layer_mask(plan, layer, length)
        name, mask = masks[place]
        known = product(mask | torch.eye(length, dtype=torch.bool), known)
        (past,) = known[-1].nonzero(as_tuple=True)
        share = float(known.sum(dtype=torch.int64)) / causal
        depths.append(Depth(layer + 1, name, share, len(past) - 1, length - 1 - int(past[0])))
    return depths, known


def product(first: Tensor, second: Tensor) -> Tensor:
    """The boolean matrix product: whether some index connects them. Counts up to 2^24 are exact in float32."""
    return first.float() @ second.float() > 0


def unreached(known: Tensor) -> int:
    """Pairs of a query and a past token that no path connects."""
    length = len(known)
    return length * (length + 1) // 2 - int(known.sum(dtype=torch.int64))


def union_density(masks: Sequence[Tensor]) -> float:
    """Share of causal pairs that at least one layer sees by itself."""
    length = masks[0].shape[0]
    return float(torch.stack(list(masks)).any(0).sum(dtype=torch.int64)) / (length * (length + 1) // 2)


def terminal_picture(mask: Tensor, rows: int = 24) -> str:
    """A mask in characters, two columns a row's height; darker where a larger share of the pairs is visible."""
    step = -(-len(mask) // rows)
    padding = -len(mask) % step
    cells = torch.nn.functional.pad(mask.float(), (0, padding, 0, padding))
    cells = cells.view(len(cells) // step, step, -1, step).mean((1, 3))
    shades = " ░▒▓█"
    darkness = (cells * (len(shades) - 1)).ceil().int().tolist()
    return "\n".join("".join(shades[cell] * 2 for cell in line) for line in darkness)

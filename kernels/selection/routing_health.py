"""Diagnostics of a router: how evenly it uses the blocks, how far back they lie, and how much of dense attention they
cover."""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.layout.selection import Selection
from kernels.selection.routing import eligible_range

SCORES_PER_CHUNK = 1 << 26


def block_use(selection: Selection, window: int) -> dict[str, Tensor]:
    """Scalars on the selection's device; the host does not wait for them.

    entropy       entropy of the use of all eligible blocks, divided by its maximum; 1: all are used equally
    never_chosen  share of the eligible blocks that no query chose
    age           mean distance in tokens from a chosen block's last token to the query
    """
    blocks = selection.offsets.shape[2] - 1
    lowest, limit = eligible_range(selection.document_start, window, selection.block, selection.query)
    limit = torch.maximum(limit, lowest)  # an empty range
    ends = torch.zeros(selection.batch, blocks + 1, dtype=torch.int32, device=selection.device)
    one = torch.ones_like(lowest)
    ends.scatter_add_(1, lowest.long(), one).scatter_add_(1, limit.long(), -one)
    eligible = (ends.cumsum(1)[:, None, :blocks] > 0).expand(-1, selection.selectors, -1)
    used = selection.offsets.diff(dim=2).double()
    shares = used / used.sum(-1, keepdim=True).clamp(min=1)
    entropy = -torch.special.xlogy(shares, shares).sum(-1)
    max_entropy = eligible.sum(-1).clamp(min=2).double().log()
    age = selection.query_index[:, None] - ((selection.chosen + 1) * selection.block - 1)
    is_used = selection.chosen >= 0
    return {
        "entropy": (entropy / max_entropy).mean().float(),
        "never_chosen": ((used == 0) & eligible).sum().float() / eligible.sum().clamp(min=1),
        "age": torch.where(is_used, age, 0).double().sum().float() / is_used.sum().clamp(min=1),
    }


def union_of_neighbours(chosen: Tensor, neighbours: int = 8) -> Tensor:
    """Number of different blocks among the choices of `neighbours` consecutive queries, over the number of choices.

    1 if no two queries choose the same block, 1 / neighbours if all choose the same ones. `chosen` is
    `Selection.chosen`, `[..., queries, slots]`; the result is a float32 scalar on its device.
    """
    queries, slots = chosen.shape[-2:]
    padded = F.pad(chosen, (0, 0, 0, -queries % neighbours), value=-1)
    ordered = padded.reshape(-1, neighbours * slots).sort(-1).values
    is_used = ordered >= 0
    new = torch.cat([is_used[:, :1], is_used[:, 1:] & (ordered[:, 1:] != ordered[:, :-1])], 1)
    return new.sum().float() / is_used.sum().clamp(min=1)


def recall(
    q: Tensor, k: Tensor, selection: Selection, window: int, queries: Tensor, scale: float | None = None
) -> Tensor:
    """The share of dense causal attention that falls on the window and the chosen blocks, `[batch, heads, sampled]`.

    q, k as attention() takes them; queries int64 `[sampled]`: the sampled ones among them. float32 (float64 for float64
    inputs); time and memory are O(sampled x keys).
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    batch, heads, _, _ = q.shape
    key = torch.arange(k.shape[2], device=q.device)
    shares = []
    with torch.no_grad(), torch.autocast(q.device.type, enabled=False):
        for sampled in queries.split(max(1, SCORES_PER_CHUNK // (batch * heads * len(key)))):
            first = selection.document_start[:, sampled, None]
            query = selection.query_index[sampled]
            past = (key <= query[:, None]) & (key >= first)  # [batch, sampled, keys]
            start = torch.div(query - (window - 1), selection.block, rounding_mode="floor") * selection.block
            chosen = selection.chosen[:, :, sampled]  # [batch, selectors, sampled, slots]
            blocks = selection.offsets.shape[2] - 1
            seen = torch.zeros(*chosen.shape[:3], blocks + 1, dtype=torch.bool, device=q.device)
            seen.scatter_(3, torch.where(chosen < 0, blocks, chosen).long(), True)
            seen = seen[..., :blocks].repeat_interleave(selection.block, 3)[..., : len(key)]
            seen = (seen | (key >= start[:, None])) & past[:, None]
            kv_heads = k.shape[1]
            grouped = q[:, :, sampled].to(dtype).unflatten(1, (kv_heads, -1))
            scores = (grouped @ k.to(dtype)[:, :, None].mT * scale).flatten(1, 2)
            weights = scores.masked_fill(~past[:, None], -torch.inf).softmax(-1)
            seen = seen.repeat_interleave(heads // selection.selectors, 1)
            shares.append(torch.where(seen, weights, 0.0).sum(-1))
    return torch.cat(shares, -1)

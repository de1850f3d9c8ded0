"""Attention on a Selection in plain PyTorch: gathers each query's chosen blocks, some queries at a time.

Time is O(chosen pairs), forward and backward, on any device and floating dtype; memory beyond the results is that of a
piece. It computes in float32 (float64 for float64 inputs).
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from kernels.routing import Selection

GATHERED_AT_ONCE = {"cpu": 1 << 21, "cuda": 1 << 26}
"""Elements of K in one piece: 8 MB in float32 on a CPU, 256 MB on a GPU."""


def forward(q: Tensor, k: Tensor, v: Tensor, selection: Selection, scale: float) -> tuple[Tensor, Tensor]:
    """(out, lse) as the backends of `attention()` return them."""
    gathered = _Gathered(q, k, selection, scale)
    value = gathered.cut(v)
    out = torch.zeros_like(gathered.query)
    lse = gathered.query.new_full(gathered.query.shape[:-1], -torch.inf)
    for piece, rows in gathered.pieces():
        scores = gathered.scores(piece, rows)
        highest = scores.amax(-1, keepdim=True)
        highest = torch.where(highest == -torch.inf, 0.0, highest)
        weights = scores.sub_(highest).exp_()
        total = weights.sum(-1, keepdim=True)
        out[:, :, piece] = (weights @ gathered.gather(value, rows)).div_(torch.where(total > 0, total, 1.0))
        lse[:, :, piece] = (highest + total.log()).squeeze(-1)
    return torch.empty_like(q).copy_(gathered.by_head(out)), gathered.by_head(lse[..., None])[..., 0].contiguous()


def backward(
    grad_out: Tensor,
    grad_lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    selection: Selection,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """(grad_q, grad_k, grad_v), recomputed as in kernels/backends/blocked.py."""
    gathered = _Gathered(q, k, selection, scale)
    key, value = gathered.key, gathered.cut(v)
    grad_out = grad_out.to(gathered.dtype)
    delta = gathered.by_selector((grad_out * out).sum(-1, keepdim=True) - grad_lse[..., None])
    grad_out = gathered.by_selector(grad_out)
    lse = gathered.by_selector(torch.where(lse == -torch.inf, 0.0, lse).to(gathered.dtype)[..., None])
    grad_query, grad_key, grad_value = torch.zeros_like(gathered.query), torch.zeros_like(key), torch.zeros_like(value)
    for piece, rows in gathered.pieces():
        weights = gathered.scores(piece, rows).sub_(lse[:, :, piece]).exp_()
        piece_grad = grad_out[:, :, piece]
        gathered.scatter(grad_value, rows, weights.mT @ piece_grad)
        grad_scores = (piece_grad @ gathered.gather(value, rows).mT).sub_(delta[:, :, piece]).mul_(weights)
        grad_query[:, :, piece] = grad_scores @ gathered.gather(key, rows)
        gathered.scatter(grad_key, rows, grad_scores.mT @ gathered.query[:, :, piece])
    return (
        torch.empty_like(q).copy_(gathered.by_head(grad_query.mul_(scale))),
        torch.empty_like(k).copy_(gathered.uncut(grad_key, k)),
        torch.empty_like(v).copy_(gathered.uncut(grad_value, v)),
    )


def block_mass(q: Tensor, k: Tensor, lse: Tensor, selection: Selection, scale: float) -> Tensor:
    """See kernels.selected.block_mass."""
    gathered = _Gathered(q, k, selection, scale)
    lse = gathered.by_selector(torch.where(lse == -torch.inf, 0.0, lse).to(gathered.dtype)[..., None])
    mass = gathered.query.new_zeros(selection.chosen.shape)
    for piece, rows in gathered.pieces():
        weights = gathered.scores(piece, rows).sub_(lse[:, :, piece]).exp_()
        mass[:, :, piece] = weights.unflatten(-1, (selection.slots, selection.block)).sum(-1).mean(3)
    return mass


class _Gathered:
    """q by selector, k cut in blocks, and the chosen blocks of a piece of queries.

    `query` `[batch, selectors, queries, heads a selector, head_dim]`, scaled; `key` `[batch * kv_heads * blocks, block,
    head_dim]`.
    """

    def __init__(self, q: Tensor, k: Tensor, selection: Selection, scale: float) -> None:
        self.selection = selection
        self.dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
        self.batch, self.heads, self.queries, self.head_dim = q.shape
        self.kv_heads = k.shape[1]
        self.query = self.by_selector(q.to(self.dtype) * scale)
        self.key = self.cut(k)
        blocks = -(-k.shape[2] // selection.block)
        kv_head = torch.arange(selection.selectors, device=q.device) // (selection.selectors // self.kv_heads)
        line = torch.arange(self.batch, device=q.device)[:, None] * self.kv_heads + kv_head
        self.first_block = (line * blocks)[:, :, None, None]  # of a sequence's KV head in `key`

    def pieces(self) -> Iterator[tuple[slice, Tensor]]:
        """(queries, rows): the queries' chosen blocks as rows of `key`, int64 `[batch, selectors, queries, slots]`."""
        s = self.selection
        a_query = self.batch * s.selectors * s.slots * s.block * self.head_dim
        at_once = max(1, GATHERED_AT_ONCE["cuda" if self.query.is_cuda else "cpu"] // a_query)
        for first in range(0, self.queries, at_once):
            piece = slice(first, min(first + at_once, self.queries))
            yield piece, s.chosen[:, :, piece].long().clamp(min=0) + self.first_block

    def scores(self, piece: slice, rows: Tensor) -> Tensor:
        """Scaled scores `[batch, selectors, queries, heads a selector, slots * block]`, -inf where nothing is seen."""
        s = self.selection
        chosen = s.chosen[:, :, piece, :, None]
        index = chosen * s.block + torch.arange(s.block, dtype=torch.int32, device=s.device)
        hidden = (chosen < 0) | (index < s.first_key[:, None, piece, None, None])
        scores = self.query[:, :, piece] @ self.gather(self.key, rows).mT
        return scores.masked_fill_(hidden.flatten(3)[:, :, :, None], -torch.inf)

    def gather(self, blocks: Tensor, rows: Tensor) -> Tensor:
        """The rows' blocks, `[batch, selectors, queries, slots * block, head_dim]`."""
        return blocks[rows].flatten(3, 4)

    def scatter(self, blocks: Tensor, rows: Tensor, values: Tensor) -> None:
        """Adds `[batch, selectors, queries, slots * block, head_dim]` to the blocks that were gathered."""
        blocks.index_add_(0, rows.flatten(), values.reshape(-1, *blocks.shape[1:]))

    def cut(self, x: Tensor) -> Tensor:
        """`[batch, kv_heads, keys, d]` -> `[batch * kv_heads * blocks, block, d]`, padded with zeros."""
        block = self.selection.block
        x = torch.nn.functional.pad(x.to(self.dtype), (0, 0, 0, -x.shape[2] % block))
        return x.reshape(-1, block, x.shape[-1])

    def uncut(self, blocks: Tensor, like: Tensor) -> Tensor:
        return blocks.view(self.batch, self.kv_heads, -1, like.shape[-1])[:, :, : like.shape[2]]

    def by_selector(self, x: Tensor) -> Tensor:
        """`[batch, heads, queries, d]` -> `[batch, selectors, queries, heads a selector, d]`."""
        return x.unflatten(1, (self.selection.selectors, -1)).transpose(2, 3)

    def by_head(self, x: Tensor) -> Tensor:
        """The inverse of `by_selector`."""
        return x.transpose(2, 3).flatten(1, 2)

"""Sparse attention in plain PyTorch: gathers the tiles that the layout lists. The backend for training on a CPU.

Rows (blocks of queries) with equally many tiles are stacked, so that a whole stack is one batched matrix product; the
heads of a GQA group share their K/V and are stacked into one tall block of queries. Stacks are cut so that the scores
of a piece stay in the processor's cache. Time and memory are O(tiles), forward and backward; gradients are
deterministic on a CPU.

Scores are in units of ln 2 and weights are powers of two, as in FlashAttention: on a CPU `exp` of a hidden pair's -inf
takes up to 40 times as long as of an ordinary score, `exp2` does not. The log-sum-exp that is returned is natural.

A weight of 0 does not hide a NaN or an infinity in a partial tile. Both passes look for one in their results, and
compute them once more over visible pairs alone where there is one.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.backends.masked_product import all_finite, masked_product
from kernels.layout.block_layout import BlockLayout

SCORES_AT_ONCE = 1 << 20
"""Scores in one piece: 4 MB in float32, which a current CPU's cache holds."""


def unsupported(q: Tensor, k: Tensor, v: Tensor, layout: BlockLayout) -> str | None:
    """Serves every device and floating dtype; computes in float32 (float64 for float64 inputs)."""
    return None if q.is_floating_point() else f"dtype {q.dtype}: it takes floating-point tensors"


def forward(q: Tensor, k: Tensor, v: Tensor, layout: BlockLayout, scale: float) -> tuple[Tensor, Tensor]:
    blocks = _Blocked(q, k, v, layout, scale)
    out, lse = _forward(blocks)
    if not all_finite(out):
        out, lse = _forward(blocks, masked=True)
    return torch.empty_like(q).copy_(blocks.unstack(out)), blocks.unstack(lse[..., None])[..., 0].contiguous()


def _forward(blocks: "_Blocked", masked: bool = False) -> tuple[Tensor, Tensor]:
    """(out, lse), stacked as `_Blocked.query`. masked: hidden values may be NaN or infinite."""
    out = torch.zeros_like(blocks.query)
    lse = blocks.query.new_full(blocks.query.shape[:-1], -torch.inf)
    for piece in blocks.pieces():
        scores = blocks.scores(piece)
        highest = scores.amax(-1, keepdim=True)
        highest = torch.where(highest == -torch.inf, 0.0, highest)  # a row that sees nothing: exp2(-inf - 0) = 0
        weights = scores.sub_(highest).exp2_()
        total = weights.sum(-1, keepdim=True)
        value = blocks.gather(blocks.value, piece)
        if masked:
            visible = blocks.visible(piece)
            sums = masked_product(weights.masked_fill_(~visible, 0.0), value, visible)
        else:
            sums = torch.bmm(weights, value)
        out[piece.items] = sums.div_(torch.where(total > 0, total, 1.0))
        lse[piece.items] = (highest + total.log2()).mul_(math.log(2)).squeeze(-1)
    return out, lse


def backward(
    grad_out: Tensor,
    grad_lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    layout: BlockLayout,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The usual recomputation (Dao et al. 2022): dS = P * (dO V^T - rowsum(dO * O) + dLSE)."""
    blocks = _Blocked(q, k, v, layout, scale)
    grad_out = grad_out.to(blocks.dtype)
    delta = (grad_out * out).sum(-1, keepdim=True) - grad_lse[..., None]
    delta, grad_out = blocks.stack(delta), blocks.stack(grad_out)
    lse = torch.where(lse == -torch.inf, 0.0, lse).to(blocks.dtype) / math.log(2)
    lse = blocks.stack(lse[..., None])
    grads = _backward(blocks, grad_out, delta, lse)
    if not all_finite(*grads):
        grads = _backward(blocks, grad_out, delta, lse, masked=True)
    grad_query, grad_key, grad_value = grads
    grad_query = blocks.unstack(grad_query.mul_(scale))
    grad_key.mul_(math.log(2))  # the stacked queries are in units of ln 2
    return (
        torch.empty_like(q).copy_(grad_query),
        torch.empty_like(k).copy_(blocks.unblock(grad_key, k)),
        torch.empty_like(v).copy_(blocks.unblock(grad_value, v)),
    )


def _backward(
    blocks: "_Blocked", grad_out: Tensor, delta: Tensor, lse: Tensor, masked: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `_Blocked`'s query (without the scale), key and value. masked: as in `_forward`."""
    grad_query, grad_key, grad_value = (torch.zeros_like(t) for t in (blocks.query, blocks.key, blocks.value))
    for piece in blocks.pieces():
        query, key, value = (
            blocks.query.index_select(0, piece.items),
            blocks.gather(blocks.key, piece),
            blocks.gather(blocks.value, piece),
        )
        piece_grad = grad_out.index_select(0, piece.items)
        weights = blocks.scores(piece).sub_(lse.index_select(0, piece.items)).exp2_()
        grad_scores = torch.bmm(piece_grad, value.mT).sub_(delta.index_select(0, piece.items)).mul_(weights)
        if masked:
            visible = blocks.visible(piece)
            weights.masked_fill_(~visible, 0.0)
            grad_scores.masked_fill_(~visible, 0.0)
            of_value = masked_product(weights.mT, piece_grad, visible.mT)
            of_query = masked_product(grad_scores, key, visible)
            of_key = masked_product(grad_scores.mT, query, visible.mT)
        else:
            of_value = torch.bmm(weights.mT, piece_grad)
            of_query = torch.bmm(grad_scores, key)
            of_key = torch.bmm(grad_scores.mT, query)
        blocks.scatter(grad_value, piece, of_value)
        grad_query[piece.items] = of_query
        blocks.scatter(grad_key, piece, of_key)
    return grad_query, grad_key, grad_value


@dataclass(frozen=True)
class _Piece:
    """Items (a block of queries of a KV head each) with equally many tiles, of which the first `partial` have masks."""

    items: Tensor  # int64 [items]
    key_blocks: Tensor  # int64 [items, tiles]: into the stacked key blocks
    tiles: Tensor  # int64 [items, partial]: into the mask table
    partial: int


class _Blocked:
    """q, k, v cut in the layout's blocks and stacked.

    `query` `[items, group * block, head_dim]`, already scaled, in units of ln 2; an item is (batch, KV head, row of
    blocks), row fastest.
    `key` and `value` `[batch * kv_heads * key blocks, block, head_dim]`.
    """

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, layout: BlockLayout, scale: float) -> None:
        self.layout, self.block = layout, layout.block
        self.dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
        self.batch, self.heads, self.queries, _ = q.shape
        self.kv_heads = k.shape[1]
        self.group = self.heads // self.kv_heads
        self.rows, self.columns = -(-self.queries // self.block), -(-k.shape[2] // self.block)
        self.query = self.stack(q.to(self.dtype) * (scale / math.log(2)))
        self.key, self.value = (
            self._cut(k).reshape(-1, self.block, k.shape[-1]),
            self._cut(v).reshape(-1, self.block, v.shape[-1]),
        )
        self.masks = ~layout.tile_masks()

    def pieces(self) -> Iterator[_Piece]:
        rows, lines = self.layout.rows, (self.batch, self.kv_heads, self.rows)
        start, count, partial = (t.expand(lines).flatten().long() for t in (rows.start, rows.count, rows.partial))
        base = (torch.arange(len(count), device=count.device) // self.rows) * self.columns
        order = torch.argsort(count * (self.columns + 1) + partial, stable=True)
        kinds, sizes = torch.unique_consecutive(torch.stack([count, partial])[:, order], dim=1, return_counts=True)
        first = 0
        for (tiles, masked), size in zip(kinds.T.tolist(), sizes.tolist(), strict=True):
            stack, first = order[first : first + size], first + size
            if tiles == 0:
                continue
            at_once = max(1, SCORES_AT_ONCE // (self.group * self.block**2 * tiles))
            for items in stack.split(at_once):
                entries = start[items][:, None] + torch.arange(tiles, device=items.device)
                key_blocks = rows.blocks[entries] + base[items][:, None]
                yield _Piece(items, key_blocks, rows.tiles[entries[:, :masked]].long(), masked)

    def scores(self, piece: _Piece) -> Tensor:
        """Scores in units of ln 2 `[items, group * block, tiles * block]`, -inf where the layout hides the pair."""
        scores = torch.bmm(self.query.index_select(0, piece.items), self.gather(self.key, piece).mT)
        if piece.partial:
            hidden = self.masks[piece.tiles].transpose(1, 2)  # [items, block, partial, block]
            partial = scores.view(len(scores), self.group, self.block, -1, self.block)[..., : piece.partial, :]
            partial.masked_fill_(hidden[:, None], -torch.inf)
        return scores

    def visible(self, piece: _Piece) -> Tensor:
        """Booleans shaped as `scores`: whether the layout shows the pair."""
        items, tiles = piece.key_blocks.shape
        visible = self.masks.new_ones(items, self.group, self.block, tiles, self.block)
        visible[:, :, :, : piece.partial] = ~self.masks[piece.tiles].transpose(1, 2)[:, None]
        return visible.view(items, self.group * self.block, tiles * self.block)

    def gather(self, blocks: Tensor, piece: _Piece) -> Tensor:
        """The piece's key or value blocks, `[items, tiles * block, head_dim]`."""
        return blocks.index_select(0, piece.key_blocks.flatten()).view(len(piece.items), -1, blocks.shape[-1])

    def scatter(self, blocks: Tensor, piece: _Piece, values: Tensor) -> None:
        """Adds `[items, tiles * block, head_dim]` to the blocks that they were gathered from."""
        blocks.index_add_(0, piece.key_blocks.flatten(), values.view(-1, *blocks.shape[1:]))

    def stack(self, x: Tensor) -> Tensor:
        """`[batch, heads, queries, d]` -> `[items, group * block, d]`."""
        x = self._cut(x).view(self.batch, self.kv_heads, self.group, self.rows, self.block, x.shape[-1])
        return x.transpose(2, 3).reshape(-1, self.group * self.block, x.shape[-1])

    def unstack(self, x: Tensor) -> Tensor:
        """The inverse of `stack`, padding dropped."""
        x = x.view(self.batch, self.kv_heads, self.rows, self.group, self.block, -1).transpose(2, 3)
        return x.reshape(self.batch, self.heads, self.rows * self.block, -1)[:, :, : self.queries]

    def unblock(self, blocks: Tensor, like: Tensor) -> Tensor:
        """Stacked key or value blocks -> `[batch, kv_heads, keys, d]`."""
        return blocks.view(self.batch, self.kv_heads, self.columns * self.block, -1)[:, :, : like.shape[2]]

    def _cut(self, x: Tensor) -> Tensor:
        """`[batch, heads, length, d]` -> `[batch, heads, blocks, block, d]`, padded with zeros, in the computing
        dtype."""
        x = torch.nn.functional.pad(x.to(self.dtype), (0, 0, 0, -x.shape[2] % self.block))
        return x.reshape(*x.shape[:2], -1, self.block, x.shape[-1])

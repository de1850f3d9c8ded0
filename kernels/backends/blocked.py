"""Sparse attention in plain PyTorch: gathers the tiles that the layout lists. The backend for training on a CPU.

Block rows (blocks of queries) with equal numbers of tiles are batched into one matrix product. The query heads of a KV
head are stacked into one tall block of queries, which shares the tiles of K and V. Batches are split into chunks whose
scores fit in the processor's cache. Time and memory are O(tiles), forward and backward; gradients are deterministic on
a CPU.

Scores are in units of ln 2 and weights are powers of two, as in FlashAttention: on a CPU, `exp` of a hidden pair's -inf
takes up to 40 times as long as `exp` of a finite score; `exp2` does not. The returned log-sum-exp is natural.

A weight of 0 does not hide a NaN or an infinity in a partial tile, because 0 * NaN is NaN. If a pass returns values
that are not finite, it is repeated with products that sum over visible pairs alone.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.backends.masked_product import all_finite, masked_product
from kernels.layout.block_layout import BlockLayout

SCORES_PER_CHUNK = 1 << 20
"""Scores per chunk: 4 MB in float32, which fits in the cache of a current CPU."""


def unsupported(q: Tensor, k: Tensor, v: Tensor, layout: BlockLayout) -> str | None:
    """Serves every device and floating dtype; computes in float32 (float64 for float64 inputs)."""
    return None if q.is_floating_point() else f"dtype {q.dtype}: must be a floating-point dtype"


def forward(q: Tensor, k: Tensor, v: Tensor, layout: BlockLayout, scale: float) -> tuple[Tensor, Tensor]:
    blocks = _Blocked(q, k, v, layout, scale)
    out, lse = _forward(blocks)
    if not all_finite(out):
        out, lse = _forward(blocks, masked=True)
    return torch.empty_like(q).copy_(blocks.unstack(out)), blocks.unstack(lse[..., None])[..., 0].contiguous()


def _forward(blocks: "_Blocked", masked: bool = False) -> tuple[Tensor, Tensor]:
    """(out, lse), stacked like `_Blocked.query`. masked: sum over visible pairs alone."""
    out = torch.zeros_like(blocks.query)
    lse = blocks.query.new_full(blocks.query.shape[:-1], -torch.inf)
    for chunk in blocks.chunks():
        scores = blocks.scores(chunk)
        highest = scores.amax(-1, keepdim=True)
        highest = torch.where(highest == -torch.inf, 0.0, highest)  # for a row without visible keys: exp2(-inf - 0) = 0
        weights = scores.sub_(highest).exp2_()
        total = weights.sum(-1, keepdim=True)
        value = blocks.gather(blocks.value, chunk)
        if masked:
            visible = blocks.visible(chunk)
            sums = masked_product(weights.masked_fill_(~visible, 0.0), value, visible)
        else:
            sums = torch.bmm(weights, value)
        out[chunk.items] = sums.div_(torch.where(total > 0, total, 1.0))
        lse[chunk.items] = (highest + total.log2()).mul_(math.log(2)).squeeze(-1)
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
    """The gradients of query (without the factor `scale`), key and value of `blocks`. masked: as in `_forward`."""
    grad_query, grad_key, grad_value = (torch.zeros_like(t) for t in (blocks.query, blocks.key, blocks.value))
    for chunk in blocks.chunks():
        query, key, value = (
            blocks.query.index_select(0, chunk.items),
            blocks.gather(blocks.key, chunk),
            blocks.gather(blocks.value, chunk),
        )
        chunk_grad_out = grad_out.index_select(0, chunk.items)
        weights = blocks.scores(chunk).sub_(lse.index_select(0, chunk.items)).exp2_()
        grad_scores = torch.bmm(chunk_grad_out, value.mT).sub_(delta.index_select(0, chunk.items)).mul_(weights)
        if masked:
            visible = blocks.visible(chunk)
            weights.masked_fill_(~visible, 0.0)
            grad_scores.masked_fill_(~visible, 0.0)
            chunk_grad_value = masked_product(weights.mT, chunk_grad_out, visible.mT)
            chunk_grad_query = masked_product(grad_scores, key, visible)
            chunk_grad_key = masked_product(grad_scores.mT, query, visible.mT)
        else:
            chunk_grad_value = torch.bmm(weights.mT, chunk_grad_out)
            chunk_grad_query = torch.bmm(grad_scores, key)
            chunk_grad_key = torch.bmm(grad_scores.mT, query)
        blocks.scatter(grad_value, chunk, chunk_grad_value)
        grad_query[chunk.items] = chunk_grad_query
        blocks.scatter(grad_key, chunk, chunk_grad_key)
    return grad_query, grad_key, grad_value


@dataclass(frozen=True)
class _Chunk:
    """Items with equal numbers of tiles, of which the first `partial` have masks.

    An item is one block of queries of one KV head.
    """

    items: Tensor  # int64 [items]
    key_blocks: Tensor  # int64 [items, tiles]: into the stacked key blocks
    tiles: Tensor  # int64 [items, partial]: into the mask table
    partial: int


class _Blocked:
    """q, k and v divided into the layout's blocks and stacked.

    `query` `[items, group * block, head_dim]`, scaled, in units of ln 2; items are ordered by (batch, KV head, block
    row).
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
            self._split_blocks(k).reshape(-1, self.block, k.shape[-1]),
            self._split_blocks(v).reshape(-1, self.block, v.shape[-1]),
        )
        self.masks = ~layout.tile_masks()

    def chunks(self) -> Iterator[_Chunk]:
        rows, shape = self.layout.rows, (self.batch, self.kv_heads, self.rows)
        start, count, partial = (t.expand(shape).flatten().long() for t in (rows.start, rows.count, rows.partial))
        base = (torch.arange(len(count), device=count.device) // self.rows) * self.columns
        order = torch.argsort(count * (self.columns + 1) + partial, stable=True)
        kinds, sizes = torch.unique_consecutive(torch.stack([count, partial])[:, order], dim=1, return_counts=True)
        first = 0
        for (tiles, masked), size in zip(kinds.T.tolist(), sizes.tolist(), strict=True):
            stack, first = order[first : first + size], first + size
            if tiles == 0:
                continue
            chunk_size = max(1, SCORES_PER_CHUNK // (self.group * self.block**2 * tiles))
            for items in stack.split(chunk_size):
                entries = start[items][:, None] + torch.arange(tiles, device=items.device)
                key_blocks = rows.blocks[entries] + base[items][:, None]
                yield _Chunk(items, key_blocks, rows.tiles[entries[:, :masked]].long(), masked)

    def scores(self, chunk: _Chunk) -> Tensor:
        """Scores in units of ln 2 `[items, group * block, tiles * block]`, -inf for hidden pairs."""
        scores = torch.bmm(self.query.index_select(0, chunk.items), self.gather(self.key, chunk).mT)
        if chunk.partial:
            hidden = self.masks[chunk.tiles].transpose(1, 2)  # [items, block, partial, block]
            partial = scores.view(len(scores), self.group, self.block, -1, self.block)[..., : chunk.partial, :]
            partial.masked_fill_(hidden[:, None], -torch.inf)
        return scores

    def visible(self, chunk: _Chunk) -> Tensor:
        """Booleans with the shape of `scores`: whether the pair is visible."""
        items, tiles = chunk.key_blocks.shape
        visible = self.masks.new_ones(items, self.group, self.block, tiles, self.block)
        visible[:, :, :, : chunk.partial] = ~self.masks[chunk.tiles].transpose(1, 2)[:, None]
        return visible.view(items, self.group * self.block, tiles * self.block)

    def gather(self, blocks: Tensor, chunk: _Chunk) -> Tensor:
        """The chunk's key or value blocks, `[items, tiles * block, head_dim]`."""
        return blocks.index_select(0, chunk.key_blocks.flatten()).view(len(chunk.items), -1, blocks.shape[-1])

    def scatter(self, blocks: Tensor, chunk: _Chunk, values: Tensor) -> None:
        """Adds `[items, tiles * block, head_dim]` to the blocks that they were gathered from."""
        blocks.index_add_(0, chunk.key_blocks.flatten(), values.view(-1, *blocks.shape[1:]))

    def stack(self, x: Tensor) -> Tensor:
        """`[batch, heads, queries, d]` -> `[items, group * block, d]`."""
        x = self._split_blocks(x).view(self.batch, self.kv_heads, self.group, self.rows, self.block, x.shape[-1])
        return x.transpose(2, 3).reshape(-1, self.group * self.block, x.shape[-1])

    def unstack(self, x: Tensor) -> Tensor:
        """The inverse of `stack`; drops the padding."""
        x = x.view(self.batch, self.kv_heads, self.rows, self.group, self.block, -1).transpose(2, 3)
        return x.reshape(self.batch, self.heads, self.rows * self.block, -1)[:, :, : self.queries]

    def unblock(self, blocks: Tensor, like: Tensor) -> Tensor:
        """Stacked key or value blocks -> `[batch, kv_heads, keys, d]`."""
        return blocks.view(self.batch, self.kv_heads, self.columns * self.block, -1)[:, :, : like.shape[2]]

    def _split_blocks(self, x: Tensor) -> Tensor:
        """`[batch, heads, length, d]` -> `[batch, heads, blocks, block, d]` in `self.dtype`, padded with zeros."""
        x = torch.nn.functional.pad(x.to(self.dtype), (0, 0, 0, -x.shape[2] % self.block))
        return x.reshape(*x.shape[:2], -1, self.block, x.shape[-1])

"""Attention on a Selection in plain PyTorch, by key block: gathers the queries that chose each block.

Each key block has one list of queries per (sequence, selector). The listed queries are gathered, attend to the block,
and merge the result into their running softmax. Time is O(chosen pairs), forward and backward, on any device and for
any floating dtype. Memory in addition to the results: q, k and v in the computing dtype (float32; float64 for float64
inputs), and one chunk. Gradients are deterministic. The host reads the lengths of the lists, so it waits for a GPU
twice per call.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.layout.selection import Selection

ELEMENTS_PER_CHUNK = {"cpu": 1 << 18, "cuda": 1 << 26}
"""Scores and elements of Q per chunk: 1 MB in float32 on a CPU, 256 MB on a GPU."""


def forward(q: Tensor, k: Tensor, v: Tensor, selection: Selection, scale: float) -> tuple[Tensor, Tensor]:
    """(out, lse) as the backends of `attention()` return them."""
    lists = _QueryLists(q, k, selection, scale)
    value = F.pad(lists.by_block(v), (0, 1), value=1.0)  # the last column sums the weights
    # The initial maximum is finite, so that no difference is NaN, even for a query without visible keys.
    highest = lists.query.new_full((*lists.query.shape[:2], 1), torch.finfo(lists.dtype).min)
    sums = lists.query.new_zeros(*lists.query.shape[:2], value.shape[-1])
    for chunk in lists.chunks():
        scores, before = lists.scores(chunk), chunk.gather(highest)
        now = torch.maximum(scores.amax(-1, keepdim=True), before)
        chunk_sums = chunk.gather(sums).mul_((before - now).exp_())
        chunk_sums.baddbmm_(scores.sub_(now).exp_(), chunk.zero_hidden(value[chunk.block]))
        chunk.store(sums, chunk_sums)
        chunk.store(highest, now)
    total = sums[..., -1:]
    lse = lists.by_head(highest.add_(total.log()))[..., 0].contiguous()
    out = sums[..., :-1].div_(torch.where(total > 0, total, 1.0))
    return torch.empty_like(q).copy_(lists.by_head(out)), lse


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
    lists = _QueryLists(q, k, selection, scale)
    key, value = lists.key, lists.by_block(v)
    grad_out = grad_out.to(lists.dtype)
    delta = lists.by_query((grad_out * out).sum(-1, keepdim=True) - grad_lse[..., None])
    grad_out, lse = lists.by_query(grad_out), lists.finite(lse)
    grad_query = torch.zeros_like(lists.query)
    grad_key, grad_value = lists.zeros_by_selector(key), lists.zeros_by_selector(value)
    for chunk in lists.chunks():
        weights = lists.scores(chunk).sub_(chunk.gather(lse)).exp_()
        chunk_grad_out = chunk.gather(grad_out)
        grad_value.index_add_(0, chunk.selector_block, chunk.zero_hidden(weights.mT @ chunk_grad_out))
        grad_scores = (
            (chunk_grad_out @ chunk.zero_hidden(value[chunk.block]).mT).sub_(chunk.gather(delta)).mul_(weights)
        )
        grad_key.index_add_(0, chunk.selector_block, chunk.zero_hidden(grad_scores.mT @ chunk.gather(lists.query)))
        chunk.add(grad_query, grad_scores @ chunk.zero_hidden(key[chunk.block]))
    return (
        torch.empty_like(q).copy_(lists.by_head(grad_query.mul_(scale))),
        torch.empty_like(k).copy_(lists.from_blocks(grad_key, k)),
        torch.empty_like(v).copy_(lists.from_blocks(grad_value, v)),
    )


def block_mass(q: Tensor, k: Tensor, lse: Tensor, selection: Selection, scale: float) -> Tensor:
    """See kernels.selection.selected_attention.block_mass."""
    lists = _QueryLists(q, k, selection, scale)
    lse = lists.finite(lse)
    mass = lists.query.new_zeros(selection.chosen.numel() + 1)
    for chunk in lists.chunks():
        weights = lists.scores(chunk).sub_(chunk.gather(lse)).exp_()
        mass[chunk.entry] = weights.sum(-1).unflatten(1, (-1, lists.group)).mean(-1)
    return mass[:-1].view(selection.chosen.shape)


@dataclass
class _Chunk:
    """The queries of one block in some of its lists, padded to one width with the row after all queries."""

    block: Tensor
    """int64 `[lists]`: the index of the block in `_QueryLists.key`, by KV head."""
    selector_block: Tensor
    """int64 `[lists]`: the index of the block by selector; no two are equal."""
    entry: Tensor
    """int64 `[lists, width]`: row * slots + slot. All rows differ, except padding, because a query chooses a block
    once."""
    row: Tensor
    """int64 `[lists * width]`: the queries, as rows of `_QueryLists.query`."""
    hidden: Tensor | None
    """Booleans `[lists, block, 1]`: keys before the document of the list's queries. None: no key is hidden."""

    def zero_hidden(self, rows: Tensor) -> Tensor:
        """Sets the hidden keys of `[lists, block, d]` to 0, in place, because a weight of 0 does not hide a NaN."""
        return rows if self.hidden is None else rows.masked_fill_(self.hidden, 0.0)

    def gather(self, rows: Tensor) -> Tensor:
        """`[rows, heads per selector, d]` -> `[lists, width * heads per selector, d]`."""
        return rows.index_select(0, self.row).view(len(self.entry), -1, rows.shape[-1])

    def store(self, rows: Tensor, values: Tensor) -> None:
        """Writes values, with the shape that `gather` returns, to the rows."""
        rows.flatten(1).index_copy_(0, self.row, values.view(len(self.row), -1))

    def add(self, rows: Tensor, values: Tensor) -> None:
        """Adds values, with the shape that `gather` returns, to the rows."""
        rows.flatten(1).index_add_(0, self.row, values.view(len(self.row), -1))


class _QueryLists:
    """q by query, k by block, and the lists of queries that chose each block, in chunks.

    `query` `[batch * selectors * queries + 1, heads per selector, head_dim]` is scaled; its last row is zero and pads
    the lists, so it contributes nothing to gradients. `key` `[batch * kv_heads * blocks, block, head_dim]`.
    """

    def __init__(self, q: Tensor, k: Tensor, selection: Selection, scale: float) -> None:
        self.selection = selection
        self.dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
        self.batch, self.kv_heads = k.shape[:2]
        self.group = q.shape[1] // selection.selectors
        self.query = self.by_query(q.to(self.dtype) * scale)
        self.key = self.by_block(k)
        self.blocks = -(-k.shape[2] // selection.block)

    def chunks(self) -> Iterator[_Chunk]:
        """Chunks that contain every (query, chosen block) once, in ascending order of blocks."""
        s = self.selection
        list_count = s.batch * s.selectors
        offsets, entries = s.offsets.view(list_count, -1), s.entries.view(list_count, -1)
        counts = offsets.diff()
        document_start = F.pad(s.document_start[:, None].expand(-1, s.selectors, -1).reshape(-1), (0, 1))
        documents = bool((s.document_start > 0).any())
        index = torch.arange(s.block, device=s.device)
        budget = ELEMENTS_PER_CHUNK["cuda" if self.query.is_cuda else "cpu"]
        budget //= self.group * (s.block + self.query.shape[-1])
        for block, lengths in enumerate(counts.T.tolist()):
            done = 0
            while remaining := [(number, length - done) for number, length in enumerate(lengths) if length > done]:
                # At most twice the mean length, so that less than half of the work is padding.
                mean = -(-sum(length for _, length in remaining) // len(remaining))
                width = max(1, min(max(length for _, length in remaining), 2 * mean, budget // len(remaining)))
                list_index = torch.tensor([number for number, _ in remaining], device=s.device)
                position = torch.arange(done, done + width, device=s.device)
                last = counts[list_index, block, None] - 1
                entry = entries[list_index[:, None], offsets[list_index, block, None] + torch.minimum(position, last)]
                entry = entry.long() + list_index[:, None] * entries.shape[1]
                entry = torch.where(position <= last, entry, s.chosen.numel())
                row = (entry // s.slots).flatten()
                hidden = None
                if documents:
                    hidden = (index < (document_start[row[::width]] - block * s.block)[:, None])[..., None]
                at_kv = list_index // (s.selectors // self.kv_heads) * self.blocks + block
                yield _Chunk(at_kv, list_index * self.blocks + block, entry, row, hidden)
                done += width

    def scores(self, chunk: _Chunk) -> Tensor:
        """Scaled scores `[lists, width * heads per selector, block]`, -inf for hidden keys."""
        scores = chunk.gather(self.query) @ chunk.zero_hidden(self.key[chunk.block]).mT
        if chunk.hidden is not None:
            scores.masked_fill_(chunk.hidden.mT, -torch.inf)
        return scores

    def finite(self, lse: Tensor) -> Tensor:
        """lse `[batch, heads, queries]` by query, with 0 instead of -inf (queries without visible keys)."""
        return self.by_query(torch.where(lse == -torch.inf, 0.0, lse).to(self.dtype)[..., None])

    def by_block(self, x: Tensor) -> Tensor:
        """`[batch, kv_heads, keys, d]` -> `[batch * kv_heads * blocks, block, d]`, padded with zeros."""
        block = self.selection.block
        x = F.pad(x.to(self.dtype), (0, 0, 0, -x.shape[2] % block))
        return x.reshape(-1, block, x.shape[-1])

    def zeros_by_selector(self, blocks: Tensor) -> Tensor:
        """Zeros with the shape of the blocks, repeated for every selector, so that no two lists of a chunk share a
        block."""
        return blocks.new_zeros(self.batch * self.selection.selectors * self.blocks, *blocks.shape[1:])

    def from_blocks(self, blocks: Tensor, like: Tensor) -> Tensor:
        """The inverse of `by_block`, summed over the selectors of a KV head."""
        shape = self.batch, self.kv_heads, -1, self.blocks * self.selection.block, like.shape[-1]
        return blocks.view(shape).sum(2)[:, :, : like.shape[2]]

    def by_query(self, x: Tensor) -> Tensor:
        """`[batch, heads, queries, d]` -> rows in the order of `query`, with zeros in the last one."""
        x = x.unflatten(1, (self.selection.selectors, -1)).transpose(2, 3).reshape(-1, self.group, x.shape[-1])
        return F.pad(x, (0, 0, 0, 0, 0, 1))

    def by_head(self, x: Tensor) -> Tensor:
        """The inverse of `by_query`."""
        s = self.selection
        x = x[:-1].view(s.batch, s.selectors, s.queries, self.group, x.shape[-1])
        return x.transpose(2, 3).flatten(1, 2)

"""Attention on a Selection in plain PyTorch, block by block: gathers the queries that chose a key block.

A block of K and V is read where it lies; the queries of its lists, one list for every (sequence, selector), come to it,
and what they find is merged into their running softmax. Time is O(chosen pairs), forward and backward, on any device
and floating dtype; memory beyond the results is that of q, k and v in the computing dtype and of a piece: float32
(float64 for float64 inputs). Gradients are deterministic. The lengths of lists are read on the host, so a GPU is waited
for twice a call.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.layout.selection import Selection

GATHERED_AT_ONCE = {"cpu": 1 << 18, "cuda": 1 << 26}
"""Scores and elements of Q in one piece: 1 MB in float32 on a CPU, 256 MB on a GPU."""


def forward(q: Tensor, k: Tensor, v: Tensor, selection: Selection, scale: float) -> tuple[Tensor, Tensor]:
    """(out, lse) as the backends of `attention()` return them."""
    lists = _Lists(q, k, selection, scale)
    value = F.pad(lists.cut(v), (0, 1), value=1.0)  # its last column adds up the weights
    # Of a finite beginning no difference is NaN, even for a query that sees nothing.
    highest = lists.query.new_full((*lists.query.shape[:2], 1), torch.finfo(lists.dtype).min)
    sums = lists.query.new_zeros(*lists.query.shape[:2], value.shape[-1])
    for piece in lists.pieces():
        scores, before = lists.scores(piece), piece.gather(highest)
        now = torch.maximum(scores.amax(-1, keepdim=True), before)
        piece_sums = piece.gather(sums).mul_((before - now).exp_())
        piece_sums.baddbmm_(scores.sub_(now).exp_(), piece.seen(value[piece.block]))
        piece.store(sums, piece_sums)
        piece.store(highest, now)
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
    lists = _Lists(q, k, selection, scale)
    key, value = lists.key, lists.cut(v)
    grad_out = grad_out.to(lists.dtype)
    delta = lists.by_query((grad_out * out).sum(-1, keepdim=True) - grad_lse[..., None])
    grad_out, lse = lists.by_query(grad_out), lists.finite(lse)
    grad_query = torch.zeros_like(lists.query)
    grad_key, grad_value = lists.zeros_by_selector(key), lists.zeros_by_selector(value)
    for piece in lists.pieces():
        weights = lists.scores(piece).sub_(piece.gather(lse)).exp_()
        piece_grad = piece.gather(grad_out)
        grad_value.index_add_(0, piece.selector_block, piece.seen(weights.mT @ piece_grad))
        grad_scores = (piece_grad @ piece.seen(value[piece.block]).mT).sub_(piece.gather(delta)).mul_(weights)
        grad_key.index_add_(0, piece.selector_block, piece.seen(grad_scores.mT @ piece.gather(lists.query)))
        piece.add(grad_query, grad_scores @ piece.seen(key[piece.block]))
    return (
        torch.empty_like(q).copy_(lists.by_head(grad_query.mul_(scale))),
        torch.empty_like(k).copy_(lists.uncut(grad_key, k)),
        torch.empty_like(v).copy_(lists.uncut(grad_value, v)),
    )


def block_mass(q: Tensor, k: Tensor, lse: Tensor, selection: Selection, scale: float) -> Tensor:
    """See kernels.selection.selected_attention.block_mass."""
    lists = _Lists(q, k, selection, scale)
    lse = lists.finite(lse)
    mass = lists.query.new_zeros(selection.chosen.numel() + 1)
    for piece in lists.pieces():
        weights = lists.scores(piece).sub_(piece.gather(lse)).exp_()
        mass[piece.entry] = weights.sum(-1).unflatten(1, (-1, lists.group)).mean(-1)
    return mass[:-1].view(selection.chosen.shape)


@dataclass
class _Piece:
    """One block's queries in some lists, each list padded with the row behind all queries' rows."""

    block: Tensor
    """int64 `[lists]`: a list's block as a row of K and V by KV head."""
    selector_block: Tensor
    """int64 `[lists]`: the same by selector; no two are equal."""
    entry: Tensor
    """int64 `[lists, width]`: row * slots + slot. No two rows but of padding are equal: a query lists a block once."""
    row: Tensor
    """int64 `[lists * width]`: the queries, as rows of `_Lists.query`."""
    hidden: Tensor | None
    """Booleans `[lists, block, 1]`: keys before the document of the list's queries; None where all are seen."""

    def seen(self, rows: Tensor) -> Tensor:
        """`[lists, block, d]` with zeros for hidden keys, in place: a weight of 0 does not hide a NaN."""
        return rows if self.hidden is None else rows.masked_fill_(self.hidden, 0.0)

    def gather(self, rows: Tensor) -> Tensor:
        """`[rows, heads a selector, d]` -> `[lists, width * heads a selector, d]`."""
        return rows.index_select(0, self.row).view(len(self.entry), -1, rows.shape[-1])

    def store(self, rows: Tensor, values: Tensor) -> None:
        """Writes back what `gather` gave."""
        rows.flatten(1).index_copy_(0, self.row, values.view(len(self.row), -1))

    def add(self, rows: Tensor, values: Tensor) -> None:
        """Adds values, shaped as `gather` gives them, to the rows."""
        rows.flatten(1).index_add_(0, self.row, values.view(len(self.row), -1))


class _Lists:
    """q by query, k cut in blocks, and the lists of queries that chose a block, piece by piece.

    `query` `[batch * selectors * queries + 1, heads a selector, head_dim]`, scaled, with zeros in its last row, which
    pads lists: in gradients it counts for nothing; `key` `[batch * kv_heads * blocks, block, head_dim]`.
    """

    def __init__(self, q: Tensor, k: Tensor, selection: Selection, scale: float) -> None:
        self.selection = selection
        self.dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
        self.batch, self.kv_heads = k.shape[:2]
        self.group = q.shape[1] // selection.selectors
        self.query = self.by_query(q.to(self.dtype) * scale)
        self.key = self.cut(k)
        self.blocks = -(-k.shape[2] // selection.block)

    def pieces(self) -> Iterator[_Piece]:
        """Every chosen block of every query once, by rising block."""
        s = self.selection
        lines = s.batch * s.selectors
        offsets, entries = s.offsets.view(lines, -1), s.entries.view(lines, -1)
        counts = offsets.diff()
        document_start = F.pad(s.document_start[:, None].expand(-1, s.selectors, -1).reshape(-1), (0, 1))
        documents = bool((s.document_start > 0).any())
        index = torch.arange(s.block, device=s.device)
        at_once = GATHERED_AT_ONCE["cuda" if self.query.is_cuda else "cpu"]
        at_once //= self.group * (s.block + self.query.shape[-1])
        for block, lengths in enumerate(counts.T.tolist()):
            done = 0
            while left := [(line, length - done) for line, length in enumerate(lengths) if length > done]:
                # Twice the mean: more than half of what is computed is no padding.
                mean = -(-sum(length for _, length in left) // len(left))
                width = max(1, min(max(length for _, length in left), 2 * mean, at_once // len(left)))
                line = torch.tensor([line for line, _ in left], device=s.device)
                place = torch.arange(done, done + width, device=s.device)
                last = counts[line, block, None] - 1
                entry = entries[line[:, None], offsets[line, block, None] + torch.minimum(place, last)]
                entry = entry.long() + line[:, None] * entries.shape[1]
                entry = torch.where(place <= last, entry, s.chosen.numel())
                row = (entry // s.slots).flatten()
                hidden = None
                if documents:
                    hidden = (index < (document_start[row[::width]] - block * s.block)[:, None])[..., None]
                at_kv = line // (s.selectors // self.kv_heads) * self.blocks + block
                yield _Piece(at_kv, line * self.blocks + block, entry, row, hidden)
                done += width

    def scores(self, piece: _Piece) -> Tensor:
        """Scaled scores `[lists, width * heads a selector, block]`, -inf where nothing is seen."""
        scores = piece.gather(self.query) @ piece.seen(self.key[piece.block]).mT
        if piece.hidden is not None:
            scores.masked_fill_(piece.hidden.mT, -torch.inf)
        return scores

    def finite(self, lse: Tensor) -> Tensor:
        """lse `[batch, heads, queries]` by query, of which rows that see nothing have 0 and not -inf."""
        return self.by_query(torch.where(lse == -torch.inf, 0.0, lse).to(self.dtype)[..., None])

    def cut(self, x: Tensor) -> Tensor:
        """`[batch, kv_heads, keys, d]` -> `[batch * kv_heads * blocks, block, d]`, padded with zeros."""
        block = self.selection.block
        x = F.pad(x.to(self.dtype), (0, 0, 0, -x.shape[2] % block))
        return x.reshape(-1, block, x.shape[-1])

    def zeros_by_selector(self, blocks: Tensor) -> Tensor:
        """Zeros like K or V cut, with blocks of its own for every selector: what no two lists of a piece share."""
        return blocks.new_zeros(self.batch * self.selection.selectors * self.blocks, *blocks.shape[1:])

    def uncut(self, blocks: Tensor, like: Tensor) -> Tensor:
        """The inverse of `cut`, summed over the selectors of a KV head."""
        shape = self.batch, self.kv_heads, -1, self.blocks * self.selection.block, like.shape[-1]
        return blocks.view(shape).sum(2)[:, :, : like.shape[2]]

    def by_query(self, x: Tensor) -> Tensor:
        """`[batch, heads, queries, d]` -> rows as those of `query`, the last one zeros."""
        x = x.unflatten(1, (self.selection.selectors, -1)).transpose(2, 3).reshape(-1, self.group, x.shape[-1])
        return F.pad(x, (0, 0, 0, 0, 0, 1))

    def by_head(self, x: Tensor) -> Tensor:
        """The inverse of `by_query`."""
        s = self.selection
        x = x[:-1].view(s.batch, s.selectors, s.queries, self.group, x.shape[-1])
        return x.transpose(2, 3).flatten(1, 2)

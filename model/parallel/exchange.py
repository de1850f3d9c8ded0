"""Exchange: brings the entries that a rank wants from the ranks that hold them, and sends their gradients back.

An axis (the tokens of a sequence, or summaries of them) is held in ranges by the ranks of a group. Where every rank
wants the whole axis, the exchange is an all-gather, whose backward pass is a reduce-scatter. Else each pair of ranks
exchanges the entries that one holds and the other wants, in one batch of sends and receives: for a window these are
neighbours, and the entries are a halo.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from model.parallel.ranges import Ranges, size

_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # the name in PyTorch < 2.13
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class Move(NamedTuple):
    """`count` entries from index `source` of the holder's tensor to index `target` of the receiver's."""

    source: int
    target: int
    count: int


class Exchange:
    """The exchange of one axis among the ranks of `group`.

    held: the ranges of the axis that each rank holds; together they are the whole axis. wanted: the ranges that each
    rank receives (its own among them). Every rank builds the same exchange, and all ranks call it together.
    """

    def __init__(self, group: dist.ProcessGroup, held: Sequence[Ranges], wanted: Sequence[Ranges]) -> None:
        self.group, self.rank = group, group.rank()
        self.held, self.wanted = tuple(held), tuple(wanted)
        length = sum(map(size, held))
        sizes = {size(each) for each in held}
        self.is_gather = len(sizes) == 1 and all(each == (range(length),) for each in wanted)

    def __call__(self, tensors: Sequence[Tensor], dim: int) -> list[Tensor]:
        """Of each tensor, which holds the rank's own entries along `dim`, the entries that the rank wants, in the order
        of the axis. Differentiable: a tensor's gradient is the sum over all ranks that received an entry."""
        return list(_Exchange.apply(self, dim, *tensors))

    def sent(self) -> tuple[int, int]:
        """Entries that this rank sends to others in the forward pass, and entries whose gradients it sends back."""
        others = [peer for peer in range(len(self.held)) if peer != self.rank]
        forward = sum(move.count for peer in others for move in self.moves(self.rank, peer))
        backward = sum(move.count for peer in others for move in self.moves(peer, self.rank))
        return forward, backward

    def moves(self, holder: int, receiver: int) -> list[Move]:
        """The entries that one rank holds and another one wants."""
        found, source = [], 0
        for held in self.held[holder]:
            target = 0
            for wanted in self.wanted[receiver]:
                start, stop = max(held.start, wanted.start), min(held.stop, wanted.stop)
                if start < stop:
                    found.append(Move(source + start - held.start, target + start - wanted.start, stop - start))
                target += len(wanted)
            source += len(held)
        return found

    def gather(self, x: Tensor, dim: int) -> Tensor:
        rows = x.movedim(dim, 0).contiguous()  # a copy only where several sequences share the batch
        found = rows.new_empty(len(self.held) * len(rows), *rows.shape[1:])
        _all_gather(found, rows, group=self.group)
        return self._ordered(found).movedim(0, dim)

    def scatter_sum(self, x: Tensor, dim: int) -> Tensor:
        """The transpose of `gather`: each rank receives the sum of its own entries over all ranks."""
        rows = x.movedim(dim, 0)
        by_rank = torch.cat([rows[each.start : each.stop] for ranges in self.held for each in ranges])
        found = rows.new_empty(size(self.held[self.rank]), *rows.shape[1:])
        _reduce_scatter(found, by_rank, group=self.group)
        return found.movedim(0, dim)

    def _ordered(self, rows: Tensor) -> Tensor:
        """Rows in the order of the axis, from rows rank by rank."""
        ranges = [each for held in self.held for each in held]
        if ranges == sorted(ranges, key=lambda each: each.start):
            return rows
        parts = dict(zip(ranges, rows.split([len(each) for each in ranges]), strict=True))
        return torch.cat([parts[each] for each in sorted(ranges, key=lambda each: each.start)])

    def bring(self, tensors: Sequence[Tensor], dim: int) -> list[Tensor]:
        """Wanted entries from the ranks that hold them, by sends and receives."""
        wanted = size(self.wanted[self.rank])
        outs = [x.new_empty(*x.shape[:dim], wanted, *x.shape[dim + 1 :]) for x in tensors]
        for move in self.moves(self.rank, self.rank):
            for x, out in zip(tensors, outs, strict=True):
                out.narrow(dim, move.target, move.count).copy_(x.narrow(dim, move.source, move.count))
        outgoing = [[(m.source, m.count) for m in self.moves(self.rank, peer)] for peer in range(len(self.held))]
        incoming = [[(m.target, m.count) for m in self.moves(peer, self.rank)] for peer in range(len(self.held))]
        for places, parts in self._send_and_receive(tensors, dim, outgoing, incoming):
            for out, part in zip(outs, parts, strict=True):
                for (target, count), piece in zip(places, part.split([n for _, n in places], dim), strict=True):
                    out.narrow(dim, target, count).copy_(piece)
        return outs

    def give_back(self, grads: Sequence[Tensor], dim: int) -> list[Tensor]:
        """The transpose of `bring`: gradients of received entries go back to their holder, who adds them up in the
        order of the ranks."""
        held = size(self.held[self.rank])
        outs = [x.new_zeros(*x.shape[:dim], held, *x.shape[dim + 1 :]) for x in grads]
        for move in self.moves(self.rank, self.rank):
            for grad, out in zip(grads, outs, strict=True):
                out.narrow(dim, move.source, move.count).add_(grad.narrow(dim, move.target, move.count))
        outgoing = [[(m.target, m.count) for m in self.moves(peer, self.rank)] for peer in range(len(self.held))]
        incoming = [[(m.source, m.count) for m in self.moves(self.rank, peer)] for peer in range(len(self.held))]
        for places, parts in self._send_and_receive(grads, dim, outgoing, incoming):
            for out, part in zip(outs, parts, strict=True):
                for (source, count), piece in zip(places, part.split([n for _, n in places], dim), strict=True):
                    out.narrow(dim, source, count).add_(piece)
        return outs

    def _send_and_receive(
        self,
        tensors: Sequence[Tensor],
        dim: int,
        outgoing: Sequence[Sequence[tuple[int, int]]],
        incoming: Sequence[Sequence[tuple[int, int]]],
    ) -> list[tuple[Sequence[tuple[int, int]], list[Tensor]]]:
        """Sends the (index, count) of `outgoing` to each rank. Returns, for each rank that sends something, its entry
        of `incoming` and the received entries of each tensor."""
        operations, received = [], []
        for peer, (leaving, arriving) in enumerate(zip(outgoing, incoming, strict=True)):
            if peer == self.rank:
                continue
            if leaving:
                for x in tensors:
                    part = torch.cat([x.narrow(dim, index, count) for index, count in leaving], dim).contiguous()
                    operations.append(dist.P2POp(dist.isend, part, group=self.group, group_peer=peer))
            if arriving:
                total = sum(count for _, count in arriving)
                parts = [x.new_empty(*x.shape[:dim], total, *x.shape[dim + 1 :]) for x in tensors]
                operations += [dist.P2POp(dist.irecv, part, group=self.group, group_peer=peer) for part in parts]
                received.append((arriving, parts))
        if operations:
            for work in dist.batch_isend_irecv(operations):
                work.wait()
        return received


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx, exchange: Exchange, dim: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.exchange, ctx.dim = exchange, dim
        if exchange.is_gather:
            return tuple(exchange.gather(x, dim) for x in tensors)
        return tuple(exchange.bring(tensors, dim))

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor | None, ...]:
        exchange, wanted = ctx.exchange, ctx.needs_input_grad[2:]
        given = [grad for grad, want in zip(grads, wanted, strict=True) if want]
        if exchange.is_gather:
            back = iter([exchange.scatter_sum(grad, ctx.dim) for grad in given])
        else:
            back = iter(exchange.give_back(given, ctx.dim))
        return None, None, *(next(back) if want else None for want in wanted)

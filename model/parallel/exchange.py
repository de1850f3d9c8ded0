"""Exchange: brings the entries that a rank wants from the ranks that hold them, and sends their gradients back.

An axis (the tokens of a sequence, or summaries of them) is held in ranges by the ranks of a group. Where every rank
wants the whole axis, the exchange is an all-gather, whose backward pass is a reduce-scatter. Else each pair of ranks
exchanges the entries that one holds and the other wants, in one batch of sends and receives: for a window these are
neighbours, and the entries are a halo. An exchange is a `torch.library` operator: a layer compiles as one graph.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from model.parallel.ranges import Ranges, size

GATHER = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"  # PyTorch before 2.13
REDUCE_SCATTER = "reduce_scatter_single" if hasattr(dist, "reduce_scatter_single") else "reduce_scatter_tensor"

_exchanges: dict[int, "Exchange"] = {}
_handles: dict[tuple, int] = {}


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
        # The operator takes a number for an exchange; equal ones share it, so that a new batch needs no new graph.
        self.handle = _handles.setdefault((group.group_name, self.held, self.wanted), len(_handles))
        _exchanges[self.handle] = self

    def __call__(self, tensors: Sequence[Tensor], dim: int) -> list[Tensor]:
        """Of each tensor, which holds the rank's own entries along `dim`, the entries that the rank wants, in the order
        of the axis. Differentiable: a tensor's gradient is the sum over all ranks that received an entry."""
        return torch.ops.farsight.exchange(list(tensors), dim, self.handle)

    @property
    def wanted_here(self) -> Ranges:
        """The ranges that this rank holds after the exchange."""
        return self.wanted[self.rank]

    def sent(self) -> tuple[int, int]:
        """Entries that this rank sends to others in the forward pass, and entries whose gradients it sends back."""
        others = [peer for peer in range(len(self.held)) if peer != self.rank]
        forward = sum(move.count for peer in others for move in self.moves(self.rank, peer))
        backward = sum(move.count for peer in others for move in self.moves(peer, self.rank))
        return forward, backward

    def workspace_bytes(self, tensors: Sequence[Tensor], backward: bool) -> int:
        """Bytes that the exchange of `tensors`, or of gradients, allocates besides its results."""
        sizes = [x.numel() * x.element_size() for x in tensors]
        if self.is_gather:  # of one tensor after another
            copies = len(self.held) * (len(self.held[0]) > 1)  # where parts are interleaved, a copy in order
            return max(sizes) * (1 if backward else 1 + copies)
        entries = size(self.wanted_here if backward else self.held[self.rank])
        return sum(sizes) // entries * sum(self.sent())  # what is sent, and what arrives

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
        getattr(dist, GATHER)(found, rows, group=self.group)
        return self._ordered(found).movedim(0, dim)

    def scatter_sum(self, x: Tensor, dim: int) -> Tensor:
        """The transpose of `gather`: each rank receives the sum of its own entries over all ranks."""
        rows = x.movedim(dim, 0)
        by_rank = torch.cat([rows[each.start : each.stop] for ranges in self.held for each in ranges])
        found = rows.new_empty(size(self.held[self.rank]), *rows.shape[1:])
        getattr(dist, REDUCE_SCATTER)(found, by_rank, group=self.group)
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
        """The transpose of `bring`: gradients of received entries go back to their holder, which adds them in the
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


def workspace_bytes(tensors: Sequence[Tensor], dim: int, handle: int, backward: bool = False) -> int:
    """Exchange.workspace_bytes of a call of the operator."""
    return _exchanges[handle].workspace_bytes(tensors, backward)


@torch.library.custom_op("farsight::exchange", mutates_args=())
def _exchange(tensors: list[Tensor], dim: int, handle: int) -> list[Tensor]:
    exchange = _exchanges[handle]
    return [exchange.gather(x, dim) for x in tensors] if exchange.is_gather else exchange.bring(tensors, dim)


@_exchange.register_fake
def _(tensors, dim, handle):
    exchange = _exchanges[handle]
    return [_empty(x, dim, size(exchange.wanted_here), exchange.is_gather) for x in tensors]


@torch.library.custom_op("farsight::exchange_backward", mutates_args=())
def _exchange_backward(grads: list[Tensor], dim: int, handle: int) -> list[Tensor]:
    exchange = _exchanges[handle]
    return [exchange.scatter_sum(x, dim) for x in grads] if exchange.is_gather else exchange.give_back(grads, dim)


@_exchange_backward.register_fake
def _(grads, dim, handle):
    exchange = _exchanges[handle]
    return [_empty(x, dim, size(exchange.held[exchange.rank]), exchange.is_gather) for x in grads]


def _empty(x: Tensor, dim: int, count: int, rows_first: bool) -> Tensor:
    """Shaped and strided as `gather` and `scatter_sum` (rows_first), or `bring` and `give_back` return it."""
    rest = [*x.shape[:dim], *x.shape[dim + 1 :]]
    if rows_first:
        return x.new_empty(count, *rest).movedim(0, dim)
    return x.new_empty(*x.shape[:dim], count, *x.shape[dim + 1 :])


def _setup_context(ctx, inputs, output) -> None:
    tensors, ctx.dim, ctx.handle = inputs
    ctx.wanted = [x.requires_grad for x in tensors]


def _autograd(ctx, grads: list[Tensor]):
    given = [grad for grad, want in zip(grads, ctx.wanted, strict=True) if want]
    back = iter(torch.ops.farsight.exchange_backward(given, ctx.dim, ctx.handle))
    return [next(back) if want else None for want in ctx.wanted], None, None


_exchange.register_autograd(_autograd, setup_context=_setup_context)

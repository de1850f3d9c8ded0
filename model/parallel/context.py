"""Context: the ranks that share the sequences of a batch, and the tokens that each of them holds."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from model.parallel.exchange import Exchange
from model.parallel.ranges import Ranges, contiguous, extended, interleaved


@dataclass(frozen=True)
class Context:
    """`held`: the ranges of tokens of each rank of `group`, of sequences of `length`."""

    group: dist.ProcessGroup
    length: int
    held: tuple[Ranges, ...]

    @staticmethod
    def of(group: dist.ProcessGroup, length: int, interleave: bool = False) -> "Context":
        """Parts of equal length, in order or `interleave`d; `length` must be a multiple of the number of parts."""
        return Context(group, length, (interleaved if interleave else contiguous)(length, group.size()))

    @property
    def own(self) -> Ranges:
        """The ranges of this rank."""
        return self.held[self.group.rank()]

    def per_span(self, span: int) -> "Context":
        """Returns the context of spans of `span` tokens, of which every rank holds whole ones: its indices are
        spans."""
        held = tuple(tuple(range(each.start // span, each.stop // span) for each in ranges) for ranges in self.held)
        return Context(self.group, self.length // span, held)

    def gather(self) -> Exchange:
        """The exchange after which every rank has all tokens."""
        return Exchange(self.group, self.held, [(range(self.length),)] * len(self.held))

    def halo(self, before: int = 0, after: int = 0) -> Exchange:
        """The exchange after which every rank has its own tokens and so many before and after each of its ranges."""
        wanted = [extended(each, before, after, self.length) for each in self.held]
        return Exchange(self.group, self.held, wanted)

    def causal_pairs(self) -> int:
        """(query, key) pairs of dense causal attention of this rank's queries."""
        return sum((each.start + 1 + each.stop) * len(each) // 2 for each in self.own)


class StandInGroup:
    """Takes the place of a group in a forecast, which counts the exchanges of rank `own` without any other process."""

    group_name = "forecast"

    def __init__(self, ranks: int, own: int) -> None:
        self.ranks, self.own = ranks, own

    def size(self) -> int:
        return self.ranks

    def rank(self) -> int:
        return self.own


def context_group(ranks: int, device: torch.device, **settings: Any) -> dist.ProcessGroup:
    """The group of this rank and those that share its sequences: `ranks` ranks in a row. All ranks call it together.

    `device`: of the tensors that the group sends. NCCL needs a collective of a whole group before sends and receives
    between some of its ranks. `settings`: of the group (timeout).
    """
    if ranks == dist.get_world_size():
        assert dist.group.WORLD is not None
        group = dist.group.WORLD
    else:
        group, _ = dist.new_subgroups(ranks, **settings)
    dist.all_reduce(torch.zeros(1, device=device), group=group)
    return group

"""Memory that Muon's update allocates: stacks of all matrices of one shape (training/muon.py)."""

import copy
from collections import defaultdict
from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from ..training.muon import Muon, orthogonalize, orthogonalize_shards
from .memory_tracker import MemoryTracker


def muon_workspace(
    muon: Muon, copies: Mapping[int, int], ranks: int, device: torch.device, mode: FakeTensorMode, granularity: int
) -> int:
    """Returns the bytes that one rank's update allocates at its peak, besides weights, gradients and momentum.

    copies: id of a parameter of `muon` -> matrices of its shape that the whole model has in its place; 1 where missing
    ranks: each holds its rows of every matrix (FSDP2)
    mode, granularity: in which tensors are fake, and the bytes to which the allocator rounds
    """
    update = copy.copy(muon)  # without the attributes that are not torch.optim's
    update.orthogonalize = _of_shards(ranks) if ranks > 1 else orthogonalize
    tracker = MemoryTracker(granularity, lambda operator, arguments: 0)
    with mode, tracker, torch.device(device):
        matrices: list[Tensor] = []
        for parameter in (p for group in muon.param_groups for p in group["params"]):
            rows, columns = -(-len(parameter) // ranks), parameter.shape[1]
            for _ in range(copies.get(id(parameter), 1)):
                matrices.append(torch.zeros(rows, columns, dtype=parameter.dtype))
                matrices[-1].grad = torch.zeros_like(matrices[-1])
        update.param_groups, update.state = [muon.param_groups[0] | {"params": matrices}], defaultdict(dict)
        update.step()
        before, tracker.phase = tracker.total, "update"  # the first step has made the momentum buffers
        update.step()
    return tracker.peak["update"] - before


def _of_shards(ranks: int):
    def run(stack: Tensor, **settings) -> Tensor:
        send = lambda received, sent: None  # noqa: E731
        return orthogonalize_shards(stack, ranks * stack.shape[1], ranks, send, partial(orthogonalize, **settings))

    return run

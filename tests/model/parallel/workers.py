"""What each rank of the tests in this folder runs."""

import torch.distributed as dist
from torch import Tensor

from model.parallel.exchange import Exchange
from model.parallel.ranges import Ranges, take


def exchange_entries(held: tuple[Ranges, ...], wanted: tuple[Ranges, ...], x: Tensor, weight: Tensor) -> dict:
    """x, weight `[2, entries, 3]`: the entries that this rank receives of two tensors (x and its square), and this
    rank's gradient of the sum over all ranks of the received entries times their weight."""
    exchange = Exchange(dist.group.WORLD, held, wanted)
    rank = dist.get_rank()
    own = take(x, held[rank]).clone().requires_grad_()
    plain, square = exchange((own, own**2), 1)
    of_wanted = take(weight, wanted[rank]) * (rank + 1)
    (plain * of_wanted + square * of_wanted.cos()).sum().backward()
    return {"plain": plain.detach(), "square": square.detach(), "grad": own.grad, "sent": exchange.sent()}


def exchange_all(cases: dict[str, tuple], x: Tensor, weight: Tensor) -> dict:
    return {name: exchange_entries(*case, x, weight) for name, case in cases.items()}

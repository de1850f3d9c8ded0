"""What each rank of the tests in this folder runs."""

import torch.distributed as dist
from torch import Tensor

from model.parallel.context import Context
from model.parallel.exchange import Exchange
from model.parallel.ranges import Ranges, take
from tests.model.parallel.models import BATCH, LENGTH, model_of


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


def losses_and_gradients(name: str, interleave: bool = False) -> dict[str, Tensor]:
    """Per-token losses of this rank's tokens of `batch_of(...)`, and this rank's gradients of all parameters; without
    ranks, those of all tokens."""
    model, batch = model_of(name), BATCH
    context = None
    if dist.is_initialized():
        context = Context.of(dist.group.WORLD, LENGTH, interleave)
        batch = {key: x if key == "document" else take(x, context.own) for key, x in batch.items()}
    layouts = model.build_layouts(batch["document"], LENGTH, context)
    out = model.loss(batch["tokens"], batch["targets"], batch["position"], layouts)
    loss = out.total if out.auxiliary is None else out.total + out.auxiliary
    loss.backward()
    gradients = {f"grad {name}": parameter.grad for name, parameter in model.named_parameters()}
    return {"per_token": out.per_token, "count": out.count, "loss": loss.detach(), **gradients}


def all_models(names: list[str], interleave: bool = False) -> dict[str, dict[str, Tensor]]:
    return {name: losses_and_gradients(name, interleave) for name in names}

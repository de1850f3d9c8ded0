"""What each rank of the tests in this folder runs."""

import contextlib
from collections.abc import Iterator
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

from model.parallel.context import Context
from model.parallel.exchange import GATHER, REDUCE_SCATTER, Exchange
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


def losses_and_gradients(name: str, interleave: bool = False, compiled: bool = False) -> dict[str, Tensor]:
    """Per-token losses of this rank's tokens of BATCH, and this rank's gradients of all parameters; without ranks,
    those of all tokens. compiled: the first layer is traced as one graph."""
    model, batch = model_of(name), BATCH
    for layer in model.layers[:1] if compiled else []:
        layer.forward = torch.compile(layer.forward, fullgraph=True, dynamic=False, backend="aot_eager")
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


def all_models(names: list[str], interleave: bool = False, compiled: bool = False) -> dict[str, dict[str, Tensor]]:
    return {name: losses_and_gradients(name, interleave, compiled) for name in names}


def sent_bytes(names: list[str]) -> dict[str, dict[str, list[int]]]:
    """Bytes that this rank hands to the library for other ranks in the forward and the backward pass, and those that
    the layouts name."""
    found = {}
    for name in names:
        model, batch = model_of(name), BATCH
        context = model.share_sequences(dist.group.WORLD, LENGTH)
        batch = {key: x if key == "document" else take(x, context.own) for key, x in batch.items()}
        shards = model.build_layouts(batch["document"], LENGTH, context)
        with count_sent() as count:
            out = model.loss(batch["tokens"], batch["targets"], batch["position"], shards)
            forward = count[0]
            (out.total if out.auxiliary is None else out.total + out.auxiliary).backward()
        layers = model.bytes_sent(shards, len(batch["document"]), key_bytes=8)
        computed = [sum(each) for each in zip(*layers, strict=True)]
        found[name] = {"measured": [forward, count[0] - forward], "computed": computed}
    return found


@contextlib.contextmanager
def count_sent() -> Iterator[list[int]]:
    """Counts bytes in its first entry: of sends, and of all-gathers and reduce-scatters a rank's share once for every
    other rank."""
    count, others = [0], dist.get_world_size() - 1
    plain = {name: getattr(dist, name) for name in (GATHER, REDUCE_SCATTER, "batch_isend_irecv")}

    def gather(output, own, **settings):
        count[0] += own.nbytes * others
        return plain[GATHER](output, own, **settings)

    def reduce_scatter(own, given, **settings):
        count[0] += own.nbytes * others
        return plain[REDUCE_SCATTER](own, given, **settings)

    def send_and_receive(operations):
        count[0] += sum(each.tensor.nbytes for each in operations if each.op is dist.isend)
        return plain["batch_isend_irecv"](operations)

    counting = {GATHER: gather, REDUCE_SCATTER: reduce_scatter, "batch_isend_irecv": send_and_receive}
    with contextlib.ExitStack() as stack:
        for name, function in counting.items():
            stack.enter_context(mock.patch.object(dist, name, function))
        yield count

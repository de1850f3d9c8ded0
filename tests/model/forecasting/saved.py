"""What a layer of a real model keeps for its backward pass, from autograd's own saved tensors."""

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from configs.build import build_model
from model import Transformer
from model.forecasting.fake_layouts import tensors_of
from model.parallel.ranges import take
from model.precision import AUTOCAST


@dataclass(eq=False)
class Saved:
    """A tensor, as long as a graph keeps it for its backward pass."""

    tensor: Tensor


def saved_bytes(model: Transformer, tokens: Tensor, position: Tensor, layouts: Sequence[Any], precision: str) -> int:
    """Bytes of the tensors that the first layer keeps, rounded as a CPU's allocator does. tokens, position: those of a
    batch whose layouts are `layouts`."""
    known = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    known |= {t.untyped_storage().data_ptr() for layout in layouts for t in tensors_of(layout)}
    kept = weakref.WeakSet()  # what a graph keeps lives as long as the graph: some is let go of within the layer

    def pack(tensor: Tensor) -> Saved:
        saved = Saved(tensor.detach())  # an operator's own result, kept with its graph, would keep the graph
        kept.add(saved)
        return saved

    mixed = AUTOCAST.get(precision)
    x = model.embed_tokens(tokens).detach().requires_grad_()
    rotation = model.rotaries[0](position)
    known |= {t.untyped_storage().data_ptr() for t in (x, *rotation)}
    saving = torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved.tensor)
    with torch.autocast("cpu", mixed, enabled=mixed is not None), saving:
        y, _, diagnostics = model.layers[0](x, rotation, layouts[0])
    storages = {storage.data_ptr(): storage for storage in (each.tensor.untyped_storage() for each in kept)}
    size = lambda storage: -(-storage.nbytes() // 64) * 64  # noqa: E731
    saved = sum(size(s) for pointer, s in storages.items() if pointer not in known)
    return saved + size(y.untyped_storage()) + 64 * len(diagnostics)  # y: the next layer's input


def saved_by_ranks(cases: Sequence[tuple[Mapping[str, Any], int, Mapping[str, Tensor]]]) -> list[int]:
    """saved_bytes of this rank, of each config, its vocabulary and a batch whose sequences all ranks share."""
    found = []
    for config, vocabulary, batch in cases:
        model, length = build_model(config, vocabulary).train(), batch["tokens"].shape[1]
        context = model.share_sequences(dist.group.WORLD, length)
        layouts = model.build_layouts(batch["document"], length, context)
        tokens, position = (take(batch[key], context.own) for key in ("tokens", "position"))
        found.append(saved_bytes(model, tokens, position, layouts, config["trainer"]["precision"]))
    return found

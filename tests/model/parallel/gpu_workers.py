"""What each GPU of test_context_gpu.py runs."""

import torch
import torch.distributed as dist
from torch import Tensor

from kernels.patterns import Dense, Hierarchical, NativeSparse, Pattern, Routed, Window
from model import Transformer
from model.parallel.context import context_group
from model.parallel.ranges import take
from tests.kernels.oracle import packing
from tests.model.small import config, lively, plan, positions_of

LENGTH = 4096
ROUTED = dict(window=256, block=64, top_k=4, indexer_dim=32)
PATTERNS: dict[str, Pattern] = {
    "window": Window(512),
    "dense": Dense(),
    "hierarchical": Hierarchical(256, (16, 64), (1024,), "learned"),
    "routed": Routed(**ROUTED, router="indexer", share="group", first_block=True),
    "native_sparse": NativeSparse(
        **ROUTED,
        router="mean_key",
        share="group",
        first_block=True,
        summary_span=32,
        pooling="mean",
        combine="gates",
    ),
}


def run_model(name: str, dtype: torch.dtype, compiled: bool = False) -> dict[str, Tensor]:
    """Per-token losses of this rank's tokens and its gradients, on the CPU; without ranks, those of all tokens."""
    ranks = dist.is_initialized()
    device = torch.device("cuda", dist.get_rank() if ranks else 0)
    torch.cuda.set_device(device)
    shape = config(width=128, heads=4, kv_heads=2, head_dim=64, mlp_width=256, max_length=LENGTH, sink_logits=True)
    model = lively(Transformer(shape, plan(PATTERNS[name], block=128)), seed=1).to(device).train()
    if compiled:
        model.compile_layers()
    document = packing([100, 1500, 900, 1596], [2500, 1596]).to(device)
    tokens, targets = torch.randint(0, 64, (2, *document.shape), generator=torch.Generator().manual_seed(0)).to(device)
    batch = {"tokens": tokens, "targets": targets, "position": positions_of(document)}
    context = []
    if ranks:
        context = [model.share_sequences(context_group(dist.get_world_size(), device), LENGTH)]
        batch = {key: take(x, context[0].own) for key, x in batch.items()}
    layouts = model.build_layouts(document, LENGTH, *context)
    with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
        out = model.loss(batch["tokens"], batch["targets"], batch["position"], layouts)
    (out.total if out.auxiliary is None else out.total + out.auxiliary).backward()
    overflow = model.overflow(layouts)
    assert overflow is not None and not overflow
    gradients = {f"grad {key}": parameter.grad.cpu() for key, parameter in model.named_parameters()}
    return {"per_token": out.per_token.cpu(), **gradients}


def run_models(names: list[str], dtype: torch.dtype, compiled: bool = False) -> dict[str, dict[str, Tensor]]:
    return {name: run_model(name, dtype, compiled) for name in names}

"""One small model for every family of patterns, in float64, and a batch whose documents cross every cut."""

import torch

from kernels.patterns import (
    BlockSparse,
    Dense,
    Dilated,
    Fixed,
    Hierarchical,
    NativeSparse,
    Pattern,
    Routed,
    Strided,
    Window,
)
from model import Transformer
from model.attention.routed.indexer import IndexerTraining
from tests.kernels.oracle import packing
from tests.model.small import config, lively, plan, positions_of

LENGTH = 256
"""Of 2 and 4 ranks, whose cuts are at multiples of 64."""

MASKS: dict[str, Pattern | tuple[str, ...]] = {
    "dense": Dense(),
    "window": Window(20),
    "window_over_ranks": Window(100),
    "window_with_sinks": Window(13, sink_tokens=3),
    "dilated": Dilated(7, 3),
    "strided": Strided(10, 24, 3),
    "strided_by_sequence": Strided(10, 24, 3, align="sequence"),
    "fixed": Fixed(24, 5),
    "block_sparse": BlockSparse(16, 2, 1, 2, seed=3),
    "block_sparse_by_sequence": BlockSparse(37, 1, 1, 1, align="sequence"),
}

ROUTED = dict(window=20, block=16, top_k=2, indexer_dim=8)
GATES = dict(router="mean_key", share="group", first_block=False, summary_span=8, pooling="mean", combine="gates")

ROUTERS: dict[str, Pattern] = {
    "routed": Routed(**ROUTED, router="mean_key", share="group", first_block=True),
    "routed_by_head": Routed(**ROUTED, router="mean_key", share="head", first_block=False),
    "routed_indexer": Routed(**ROUTED, router="indexer", share="group", first_block=False),
    "routed_indexer_in_warmup": Routed(**ROUTED, router="indexer", share="head", first_block=True),
    "routed_indexer_alone_in_warmup": Routed(**ROUTED, router="indexer", share="group", first_block=False),
}

CONTIGUOUS: dict[str, Pattern] = {
    "native_sparse": NativeSparse(**ROUTED, **GATES),
    "native_sparse_learned": NativeSparse(
        **ROUTED, **GATES | {"router": "indexer", "pooling": "learned", "combine": "lse"}
    ),
    "hierarchical": Hierarchical(20, (4, 16), (60,), "mean"),
    "hierarchical_learned": Hierarchical(10, (8, 32), (50,), "learned"),
    "hierarchical_window_over_ranks": Hierarchical(90, (16,), (), "learned"),
}
"""Families whose ranks hold one range of a sequence each."""

PATTERNS = MASKS | ROUTERS | CONTIGUOUS

SCHEDULES: dict[str, dict] = {
    "window_and_dense": {"patterns": {"near": Window(20), "far": Dense()}, "rope": {"near": 300.0, "far": "none"}},
    "one_a_kv_head": {
        "patterns": {"near": Window(20), "columns": Strided(10, 24, 3)},
        "schedule": [["near", "columns"]],
    },
}


def model_of(name: str) -> Transformer:
    settings = {"patterns": PATTERNS[name]} if name in PATTERNS else SCHEDULES[name]
    shape = config(sink_logits=True, max_length=LENGTH, activation_checkpointing=name == "window")
    stages = {"indexer_warmup": int("in_warmup" in name), "indexer_warmup_alone": "alone" in name}
    indexer = IndexerTraining(indexer_loss=0.5, indexer_gradient=True, **stages)
    model = Transformer(shape, plan(**settings, indexer=indexer)).double().train()
    return lively(model, seed=1)


def make_batch() -> dict[str, torch.Tensor]:
    document = packing([5, 70, 1, 50, 80, 50], [100, 40, 60, 56])
    generator = torch.Generator().manual_seed(0)
    tokens, targets = torch.randint(0, 64, (2, *document.shape), generator=generator)
    targets[torch.rand(targets.shape, generator=generator) < 0.2] = -100
    return {"tokens": tokens, "targets": targets, "document": document, "position": positions_of(document)}


BATCH = make_batch()

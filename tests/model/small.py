"""Small transformers for tests: the real classes, sizes that take milliseconds."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from kernels.patterns import Dense, Pattern, Routed
from model import AttentionPlan, ModelConfig, Transformer
from model.attention.routed.indexer import IndexerTraining
from model.config import Rope

SIZES: dict[str, Any] = dict(
    width=16,
    layers=2,
    heads=4,
    kv_heads=2,
    head_dim=8,
    mlp_width=32,
    vocabulary=64,
    max_length=256,
    rope_theta=10000.0,
    rope_scaling="none",
    rope_factor=1.0,
    rope_original_length=64,
    rope_beta_fast=32.0,
    rope_beta_slow=1.0,
    rope_attention_factor=None,
    rope_truncate=True,
    tie_embeddings=True,
    sink_logits=False,
    norm_epsilon=1e-6,
    qk_norm=True,
    qkv_bias=False,
    activation_checkpointing=False,
    z_loss=0.0,
)


TRAINER: dict[str, Any] = dict(
    max_seconds=None,
    accumulate=1,
    save_every=None,
    log_every=1,
    precision="32-true",
    accelerator="cpu",
    devices=1,
    strategy="auto",
    context_parallel=1,
    rank_timeout=60,
    nodes=1,
    on_nan="stop",
    max_skipped_steps=0,
)
"""Arguments of fit() for one process, to which a test adds the length of its run and what it measures."""


def config(**changes: Any) -> ModelConfig:
    return ModelConfig(**(SIZES | changes))


INDEXER = IndexerTraining(indexer_loss=0.7, indexer_warmup=0, indexer_gradient=False)


def plan(
    patterns: Pattern | Mapping[str, Pattern] | None = None,
    schedule: Sequence | None = None,
    backend: str = "auto",
    block: int = 16,
    indexer: IndexerTraining = INDEXER,
    rope: Mapping[str, Rope] | None = None,
) -> AttentionPlan:
    """One pattern in every layer, or a schedule of named ones; dense by default. `indexer`: of all routed patterns."""
    patterns = Dense() if patterns is None else patterns
    patterns = {"only": patterns} if isinstance(patterns, Pattern) else patterns
    training = {name: indexer for name, pattern in patterns.items() if isinstance(pattern, Routed)}
    schedule = schedule or list(patterns)
    given = {"patterns": patterns, "schedule": schedule, "block": block, "backend": backend}
    return AttentionPlan(**given, training=training, rope=rope or {})


def lively(model: Transformer, seed: int = 0) -> Transformer:
    """Weights so large that every layer, head and sink makes a difference that no test can overlook."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            nn.init.normal_(parameter, std=0.3, generator=generator)
        elif "sink_logits" in name or ".attend." in name:
            nn.init.normal_(parameter, std=1.0, generator=generator)
    return model


def positions_of(document: torch.Tensor) -> torch.Tensor:
    """Each token's index within its document."""
    index = torch.arange(document.shape[1], device=document.device)
    begins = document.diff(dim=1, prepend=document[:, :1] - 1) != 0
    return index - torch.where(begins, index, 0).cummax(1).values

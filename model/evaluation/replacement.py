"""Another pattern in some layers or KV heads of a dense model, under the same weights."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

import torch

from kernels.patterns import Dense, Pattern
from model.config import AttentionPlan
from model.transformer import Transformer


@dataclass(frozen=True)
class Unit:
    """A layer, or one KV head of it, whose pattern may change."""

    layer: int
    head: int | None = None


def units_of(model: Transformer, per_head: bool) -> list[Unit]:
    """Returns the layers of a model, or all their KV heads."""
    heads = range(model.config.kv_heads) if per_head else [None]
    return [Unit(layer, head) for layer in range(model.config.layers) for head in heads]


@dataclass(frozen=True)
class Replacement:
    """The pattern that replaces dense attention. `plan` has both patterns under the names `dense` and `sparse`; its
    schedule does not count."""

    plan: AttentionPlan
    dense: str
    sparse: str

    @property
    def pattern(self) -> Pattern:
        return self.plan.patterns[self.sparse]

    def schedule(self, units: Sequence[Unit], kept: Collection[Unit]) -> list[str | list[str]]:
        """Returns the schedule under which the `kept` of all `units` attend densely: one entry per layer, a list where
        the KV heads of the layer differ."""
        entries = []
        for _, heads in groupby(units, key=lambda unit: unit.layer):
            names = [self.dense if unit in kept else self.sparse for unit in heads]
            entries.append(names if len(set(names)) > 1 else names[0])
        return entries

    def model(self, model: Transformer, units: Sequence[Unit], kept: Collection[Unit]) -> Transformer:
        """Returns a model with the weights of `model` (shared, not copied) and `schedule(units, kept)`.

        Raises:
            ValueError: the pattern has parameters of its own, or serves only whole layers.
        """
        return with_plan(model, replace(self.plan, schedule=self.schedule(units, kept)))

    def hides(self, tokens: int) -> bool:
        """Whether the last query of a document of `tokens` does not see every token under the sparse pattern."""
        return self.pattern.decode_cost(tokens - 1).read < tokens - 1


def with_plan(model: Transformer, plan: AttentionPlan) -> Transformer:
    """Returns a model in evaluation mode with the weights of `model`, shared and not copied, and another plan. Each
    layer keeps its rotary embeddings.

    Raises:
        ValueError: the plan needs parameters that `model` lacks, or needs them in another shape, or has rotary
            embeddings of its own.
    """
    for name, rope in plan.rope.items():
        raise ValueError(f"must not have rope={rope}, since layers keep their rotary embeddings (pattern {name})")
    with torch.device("meta"):
        changed = Transformer(model.config, plan)
    weights, own = model.state_dict(), changed.state_dict()
    for name in own.keys() & weights.keys():
        if own[name].shape != weights[name].shape:
            shapes = f"{list(weights[name].shape)}, and not {list(own[name].shape)}"
            raise ValueError(f"must be a pattern whose parameters the model has: {name} is of shape {shapes}")
    missing, _ = changed.load_state_dict(weights, strict=False, assign=True)
    if missing:
        raise ValueError(
            f"must be a pattern without parameters of its own, since the model has no {missing[0]}; pooling=mean, "
            "router=mean_key and combine=lse have none"
        )
    changed.rotaries = model.rotaries  # frequencies are not in the state
    return changed.eval()


def first_sparse_layer(model: Transformer) -> int | None:
    """Returns the first layer whose attention is not dense; None if all layers are."""
    sparse = (layer for layer, pattern in enumerate(model.patterns) if not isinstance(pattern, Dense))
    return next(sparse, None)

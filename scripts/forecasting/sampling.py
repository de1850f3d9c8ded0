"""A few sequences of the data that a run will train on, and the layouts that its layers will have of them.

What attention costs depends on where documents begin and end, so it is counted on real sequences: a seeded sample of
the training split, packed as in training. The model is built without memory (on PyTorch's meta device), and not run.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from configs.build import build_model
from data import DataModule
from kernels import Axis
from model import Transformer
from model.attention import View, build_view
from model.transformer import ModelCost
from scripts.loading import device_of

TOKENS = {"cpu": 1 << 15, "cuda": 1 << 18}
MOST = 64
"""Sequences in a sample: as many as have TOKENS tokens together, at least one, at most MOST. Their layouts take a CPU a
second or two where attention is dense, and much less elsewhere."""


@dataclass(frozen=True)
class Sample:
    """`model` on the meta device, and one view a layer (as Transformer.build_layouts gives them) of `document`, int32
    `[sequences, length]`, on the device where the run will train."""

    model: Transformer
    document: Tensor
    config: Mapping[str, Any]

    @staticmethod
    def draw(config: Mapping[str, Any], data: DataModule, vocabulary: int, sequences: int | None = None) -> "Sample":
        """Of a composed training config and its data module, which is set up; `vocabulary`: the tokenizer's;
        `sequences`: as many as MOST and TOKENS say by default."""
        with torch.device("meta"):
            model = build_model(config, vocabulary)
        device = device_of(config["trainer"]["accelerator"])
        sequences = sequences or max(1, min(MOST, TOKENS[device.type] // data.sequence_length))
        return Sample(model, data.sample(sequences)["document"].to(device), config)

    @cached_property
    def views(self) -> list[View]:
        tokens = Axis.tokens(self.document.shape[1], self.document)
        views = {p: build_view(p, tokens, self.model.plan.block) for p in dict.fromkeys(self.model.patterns)}
        for pattern, attend in zip(self.model.patterns, self.model.attends, strict=True):
            if hasattr(attend, "selectors"):  # a routed layer says so itself only when it runs
                views[pattern].selectors = attend.selectors
        return [views[pattern] for pattern in self.model.patterns]

    @cached_property
    def cost(self) -> ModelCost:
        """Of training on the whole sample, once."""
        return self.model.cost(self.views, len(self.document))

    @property
    def sequences_per_step(self) -> int:
        """On all devices."""
        trainer = self.config["trainer"]
        return self.config["data"]["batch_size"] * trainer["accumulate"] * devices_of(trainer)

    @property
    def tokens_per_step(self) -> int:
        return self.sequences_per_step * self.document.shape[1]

    @property
    def flops_per_step(self) -> float:
        """Forward and backward on every device, recomputation not counted."""
        return self.cost.flops / len(self.document) * self.sequences_per_step


def flops_per_step(config: Mapping[str, Any], data: DataModule, vocabulary: int) -> float:
    """Training FLOPs of one optimizer step, on all devices together, as model/training/efficiency.py counts them
    (forward and backward, recomputation left out): the mean over a seeded sample of the run's own sequences, from the
    layouts that they have.

    config: a composed training config, as plain dicts. data: its data module, set up. vocabulary: the tokenizer's.
    """
    return Sample.draw(config, data, vocabulary).flops_per_step


def devices_of(trainer: Mapping[str, Any]) -> int:
    """How many devices a `trainer` group trains on, as Lightning reads its `devices`: a number, a list, or -1 and auto
    for all of this machine (one of a CPU)."""
    devices = trainer["devices"]
    if isinstance(devices, list):
        return len(devices)
    if str(devices) in ("-1", "auto"):
        return torch.cuda.device_count() if device_of(trainer["accelerator"]).type == "cuda" else 1
    return int(devices)

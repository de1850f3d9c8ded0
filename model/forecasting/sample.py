"""A few sequences of the training data, and the layouts that the model's layers build for them.

The cost of attention depends on where documents begin and end, so it is counted on real sequences: a seeded sample of
the training split, packed as in training. The model has no storage (it is on PyTorch's meta device) and is not run.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from kernels import Axis

from ..attention import AttentionLayout, build_layouts
from ..precision import devices_of
from ..transformer import ModelCost, Transformer

SAMPLE_TOKENS = {"cpu": 1 << 15, "cuda": 1 << 18}
MAX_SEQUENCES = 64


def sequences_to_sample(device: torch.device, sequence_length: int) -> int:
    """Returns how many sequences a sample has: about SAMPLE_TOKENS tokens, at least one and at most MAX_SEQUENCES.

    Building dense layouts of such a sample takes a second or two on a CPU, sparse ones much less.
    """
    return max(1, min(MAX_SEQUENCES, SAMPLE_TOKENS[device.type] // sequence_length))


@dataclass(frozen=True)
class Sample:
    """Sequences of a run's training data with the model that will be trained on them.

    model: the run's model, on the meta device
    document: int32 [sequences, length], the document of each token, on the device that the run will train on
    config: the composed training config, as plain dicts
    """

    model: Transformer
    document: Tensor
    config: Mapping[str, Any]

    @cached_property
    def layouts(self) -> list[AttentionLayout]:
        """One layout per layer, as Transformer.build_layouts returns them."""
        tokens = Axis.tokens(self.document.shape[1], self.document)
        return build_layouts(self.model.patterns, tokens, self.model.plan.block)

    @cached_property
    def cost(self) -> ModelCost:
        """The cost of training on the whole sample once."""
        return self.model.cost(self.layouts, len(self.document))

    @property
    def sequences_per_step(self) -> int:
        """Sequences of one optimizer step, on all devices together."""
        trainer = self.config["trainer"]
        batches = trainer["accumulate"] * devices_of(trainer) // trainer["context_parallel"]
        return self.config["data"]["batch_size"] * batches

    @property
    def tokens_per_step(self) -> int:
        return self.sequences_per_step * self.document.shape[1]

    @property
    def flops_per_step(self) -> float:
        """FLOPs of one optimizer step on all devices, forward and backward, without recomputation: the mean over the
        sample, counted as model/training/efficiency.py counts them."""
        return self.cost.flops / len(self.document) * self.sequences_per_step

"""The forecast of a run: its size, its cost and its memory, from the composed config and the data alone."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from data import DataModule
from model.attention import cost_of
from model.decoding import expected_bytes
from scripts.forecasting.memory import MemoryForecast, device_bytes, forecast_memory
from scripts.forecasting.sampling import Sample, devices_of
from scripts.forecasting.speed import step_seconds


@dataclass(frozen=True)
class LayerForecast:
    """One layer's attention in one optimizer step, all heads and sequences: pairs that are visible, pairs in the tiles
    that are computed, and both as shares of dense causal attention's."""

    layer: int
    pattern: str
    pairs: float
    tile_pairs: float
    density_pairs: float
    density_tiles: float


@dataclass(frozen=True)
class Forecast:
    """Of a whole run, unless it says otherwise. `step_seconds`: None where the device is not calibrated. `cache_bytes`:
    keys and values of one sequence when decoding behind `data.sequence_length` tokens. `device_bytes`: what the device
    has, None where unknown."""

    parameters: int
    devices: int
    device: str
    steps: int | None
    tokens_per_step: int
    layers: tuple[LayerForecast, ...]
    flops_per_step: float
    memory: MemoryForecast
    step_seconds: float | None
    cache_bytes: int
    device_bytes: int | None

    @property
    def exceeds(self) -> bool:
        return self.device_bytes is not None and self.memory.peak_bytes > self.device_bytes

    def summary(self) -> dict[str, Any]:
        """For summary.json, beside what is measured under the same names."""
        return {
            "peak_memory_bytes": self.memory.peak_bytes,
            "step_seconds": self.step_seconds,
            "flops_per_step": self.flops_per_step,
            "parameters": self.parameters,
            "tokens_per_step": self.tokens_per_step,
            "memory_parts": self.memory.parts | {"process before the model": self.memory.before},
        }

    def to_dict(self) -> dict[str, Any]:
        """Everything, as JSON takes it."""
        layers = [vars(layer) for layer in self.layers]
        plain = vars(self) | {"layers": layers, "memory": vars(self.memory) | {"peak_bytes": self.memory.peak_bytes}}
        if self.steps is None:
            return plain
        return plain | {"tokens": self.tokens_per_step * self.steps, "flops": self.flops_per_step * self.steps}


def forecast(config: Mapping[str, Any], data: DataModule, vocabulary: int) -> Forecast:
    """Of the run that a composed training config describes; `data` is set up, `vocabulary` the tokenizer's.

    Nothing is trained and no random number drawn; on a CPU call it before the model is built, so that the memory of the
    process without it is known.
    """
    sample = Sample.draw(config, data, vocabulary)
    model, device = sample.model, sample.document.device
    memory = forecast_memory(sample)
    return Forecast(
        parameters=model.parameter_count(),
        devices=devices_of(config["trainer"]),
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        steps=config["trainer"]["max_steps"],
        tokens_per_step=sample.tokens_per_step,
        layers=_layers(sample),
        flops_per_step=sample.flops_per_step,
        memory=memory,
        step_seconds=step_seconds(sample),
        cache_bytes=expected_bytes(model, config["data"]["sequence_length"], batch=1)[0],
        device_bytes=device_bytes(device),
    )


def _layers(sample: Sample) -> tuple[LayerForecast, ...]:
    config, plan = sample.model.config, sample.model.plan
    scale = sample.sequences_per_step / len(sample.document)
    costs = {id(v): cost_of(v, len(sample.document), config.heads, config.head_dim) for v in sample.views}
    layers = []
    for layer, view in enumerate(sample.views):
        entry, cost = plan.schedule[layer % len(plan.schedule)], costs[id(view)]
        name = entry if isinstance(entry, str) else "+".join(entry)
        counts = scale * cost.visible_pairs, scale * cost.tile_pairs, cost.density_pairs, cost.density_tiles
        layers.append(LayerForecast(layer, name, *counts))
    return tuple(layers)

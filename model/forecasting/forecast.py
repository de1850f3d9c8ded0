"""The forecast of a run: its size, the cost of its attention, its FLOPs and its memory."""

from dataclasses import dataclass
from typing import Any

import torch

from ..decoding import expected_bytes
from ..precision import devices_of
from .peak_memory import MemoryForecast, device_bytes, forecast_memory
from .sample import Sample
from .step_flops import PhaseCosts, total_cost


@dataclass(frozen=True)
class LayerForecast:
    """Attention of one layer in one optimizer step, over all heads and sequences.

    pairs, tile_pairs: (query, key) pairs that are visible, and that the computed tiles hold
    density_pairs, density_tiles: both as fractions of dense causal attention
    """

    layer: int
    pattern: str
    pairs: float
    tile_pairs: float
    density_pairs: float
    density_tiles: float


@dataclass(frozen=True)
class Forecast:
    """The forecast of a whole run. Where sequences or windows grow, all but `phases` describes the last phase,
    which is the largest.

    steps: optimizer steps; None where the run ends by time
    phases: first step, and FLOPs of a step, of each phase
    cache_bytes: keys and values of one sequence after decoding `data.sequence_length` tokens
    device_bytes: memory that the run may use; None where it is unknown
    cuda_graph: whether steps are replayed from a CUDA graph, which takes memory of its own
    """

    parameters: int
    devices: int
    device: str
    steps: int | None
    tokens_per_step: int
    layers: tuple[LayerForecast, ...]
    flops_per_step: float
    phases: PhaseCosts
    memory: MemoryForecast
    cache_bytes: int
    device_bytes: int | None
    cuda_graph: bool

    @property
    def exceeds(self) -> bool:
        """Whether the forecast peak is larger than the device's memory."""
        return self.device_bytes is not None and self.memory.peak_bytes > self.device_bytes

    @property
    def flops(self) -> float | None:
        """FLOPs of all steps; None where the run ends by time."""
        return None if self.steps is None else total_cost(self.phases, self.steps)

    def summary(self) -> dict[str, Any]:
        """Returns the entries of summary.json, under the names of the measured values."""
        return {
            "peak_memory_bytes": self.memory.peak_bytes,
            "flops_per_step": self.flops_per_step,
            "parameters": self.parameters,
            "tokens_per_step": self.tokens_per_step,
            "cuda_graph": self.cuda_graph,
            "memory_parts": self.memory.parts | {"process before the model": self.memory.before},
        }

    def to_dict(self) -> dict[str, Any]:
        """Returns every value, for a JSON file."""
        layers = [vars(layer) for layer in self.layers]
        plain = vars(self) | {"layers": layers, "memory": vars(self.memory) | {"peak_bytes": self.memory.peak_bytes}}
        if self.steps is None:
            return plain
        return plain | {"tokens": self.tokens_per_step * self.steps, "flops": self.flops}


def forecast(sample: Sample, phases: PhaseCosts) -> Forecast:
    """Returns the forecast of the run that `sample` was drawn for. Nothing is trained and no random number is drawn.

    phases: the FLOPs of its phases.

    On a CPU the forecast includes the memory that the process holds now: call this before the model is built.
    """
    config, model, device = sample.config, sample.model, sample.document.device
    return Forecast(
        parameters=model.parameter_count(),
        devices=devices_of(config["trainer"]),
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        steps=config["trainer"]["max_steps"],
        tokens_per_step=sample.tokens_per_step,
        memory=forecast_memory(sample),
        layers=_layers(sample),
        flops_per_step=sample.flops_per_step,
        phases=phases,
        cache_bytes=expected_bytes(model, config["data"]["sequence_length"], batch=1)[0],
        device_bytes=device_bytes(device),
        cuda_graph=bool(config["trainer"]["cuda_graph"]),
    )


def _layers(sample: Sample) -> tuple[LayerForecast, ...]:
    plan = sample.model.plan
    scale = sample.sequences_per_step / len(sample.document)
    batch, layers = len(sample.document), zip(sample.layouts, sample.model.cores, strict=True)
    costs = {id(layout): core.cost(layout, batch) for layout, core in layers}
    layers = []
    for layer, layout in enumerate(sample.layouts):
        entry, cost = plan.schedule[layer % len(plan.schedule)], costs[id(layout)]
        name = entry if isinstance(entry, str) else "+".join(entry)
        pairs, tile_pairs = scale * cost.visible_pairs, scale * cost.tile_pairs
        layers.append(LayerForecast(layer, name, pairs, tile_pairs, cost.density_pairs, cost.density_tiles))
    return tuple(layers)

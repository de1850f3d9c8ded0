"""The forecast of a run's peak memory, on each device."""

from dataclasses import dataclass

import torch

from kernels import Axis
from model.attention import View, build_view
from model.training.efficiency import give_back_free_memory, resident_bytes
from scripts.forecasting.limits import memory_limit
from scripts.forecasting.rehearsal import rehearse
from scripts.forecasting.sampling import Sample

PROCESS, HEAP = "allocator, small objects", "heap between tensors"

ADDED = {"cpu": 5_300_000, "cuda": 32 << 20}
"""What a step adds besides tensors, fitted: on a CPU small objects and code that is first used then, on a GPU cuBLAS's
workspace (32 MB is what PyTorch takes on a Hopper GPU)."""

LOADED_LATER = 33_000_000
"""Bytes of libraries that a CPU's process loads between the forecast and its first step (fitted)."""

HELD_BY_GLIBC = 3.4
"""How many times one layer's activations glibc's heap keeps besides, in holes between tensors that live on: freed, and
resident, and too small for what comes next (fitted in the runs of docs/results/memory_cpu.json, with glibc 2.36; two to
five in single runs). It does not grow with depth, and is the same with checkpointing. Mappings of their own for all
tensors (M_MMAP_THRESHOLD) would avoid it, at the price of new pages in every step."""


@dataclass(frozen=True)
class MemoryForecast:
    """`parts`: bytes by part at the peak of a training step. `phase`: when it is, "forward", "backward" or "update".
    `before`: what the process holds without the model (its libraries), where the measured peak is the process's: on a
    CPU; else 0."""

    parts: dict[str, int]
    phase: str
    before: int

    @property
    def step_bytes(self) -> int:
        return sum(self.parts.values())

    @property
    def peak_bytes(self) -> int:
        """What summary.json's `peak_memory_bytes` will be."""
        return self.step_bytes + self.before


def forecast_memory(sample: Sample) -> MemoryForecast:
    """Of one device's step on batches like those of the sample."""
    config, device = sample.config, sample.document.device
    on_cpu = device.type == "cpu"
    in_glibc = on_cpu and give_back_free_memory()
    before = resident_bytes() + LOADED_LATER if on_cpu else 0
    batch, length = config["data"]["batch_size"], config["data"]["sequence_length"]
    step = rehearse(sample.model, _views(sample, batch), batch, length, config, device)
    parts = step.parts | {PROCESS: ADDED[device.type]}
    if in_glibc:
        parts[HEAP] = int(HELD_BY_GLIBC * step.layer)
    return MemoryForecast(parts, step.phase, before)


def device_bytes(device: torch.device) -> int | None:
    """The memory that a run on `device` may take in all: a GPU's own, or what this process may have of the machine's;
    None where nothing says."""
    return torch.cuda.mem_get_info(device)[1] if device.type == "cuda" else memory_limit()


def _views(sample: Sample, batch: int) -> list[View]:
    """Of a batch as large as in training, in the sizes that they have in training; the sample over again if need be."""
    document = sample.document.repeat(-(-batch // len(sample.document)), 1)[:batch]
    tokens = Axis.tokens(document.shape[1], document)
    block, fixed = sample.model.plan.block, document.is_cuda
    views = {pattern: build_view(pattern, tokens, block, fixed) for pattern in dict.fromkeys(sample.model.patterns)}
    return [views[pattern] for pattern in sample.model.patterns]

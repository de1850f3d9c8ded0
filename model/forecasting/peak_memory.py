"""The forecast of a run's peak memory on each device."""

from dataclasses import dataclass

import torch

from kernels import Axis

from ..attention import AttentionLayout, build_layouts, share_sequences
from ..parallel.context import StandInGroup
from ..training.memory_use import give_back_free_memory, resident_bytes
from .memory_estimate import estimate_step
from .memory_limit import memory_limit
from .sample import Sample

PROCESS, HEAP = "allocator, small objects", "heap between tensors"

PROCESS_BYTES = {"cpu": 5_300_000, "cuda": 32 << 20}
"""Memory that a step adds besides tensors. CPU: small objects and code that is first used in a step (fitted). GPU:
cuBLAS's workspace (32 MB is PyTorch's choice on a Hopper GPU)."""

LIBRARY_BYTES = 33_000_000
"""Memory of the libraries that a process on a CPU loads between the forecast and its first step (fitted)."""

HEAP_FACTOR = 3.4
"""Memory that glibc's heap keeps in holes between live tensors, as a multiple of one layer's activations (fitted on the
runs of docs/results/memory_cpu.json with glibc 2.36; single runs took two to five). It does not grow with depth and is
the same with activation checkpointing. Separate mappings for all tensors (M_MMAP_THRESHOLD) would avoid it, but then
every step takes new pages from the kernel."""


@dataclass(frozen=True)
class MemoryForecast:
    """Memory at the peak of a training step.

    parts: bytes by part
    phase: when the peak is reached: "forward", "backward" or "update"
    before: bytes of the process without the model, which a CPU's measured peak includes; 0 on a GPU
    """

    parts: dict[str, int]
    phase: str
    before: int

    @property
    def step_bytes(self) -> int:
        return sum(self.parts.values())

    @property
    def peak_bytes(self) -> int:
        """The forecast of `peak_memory_bytes` in summary.json."""
        return self.step_bytes + self.before


def forecast_memory(sample: Sample) -> MemoryForecast:
    """Returns the memory of one device's training step on batches like those of the sample."""
    config, device = sample.config, sample.document.device
    on_cpu = device.type == "cpu"
    in_glibc = on_cpu and give_back_free_memory()
    before = resident_bytes() + LIBRARY_BYTES if on_cpu else 0
    batch, length = config["data"]["batch_size"], config["data"]["sequence_length"]
    step = estimate_step(sample.model, _training_layouts(sample, batch), batch, length, config, device)
    parts = step.parts | {PROCESS: PROCESS_BYTES[device.type]}
    if in_glibc:
        parts[HEAP] = int(HEAP_FACTOR * step.layer_heap_bytes)
    return MemoryForecast(parts, step.phase, before)


def device_bytes(device: torch.device) -> int | None:
    """Returns the memory that a run on `device` may use: all of a GPU's, or this process's share of the machine's. None
    where it is unknown."""
    return torch.cuda.mem_get_info(device)[1] if device.type == "cuda" else memory_limit()


def _training_layouts(sample: Sample, batch: int) -> list[AttentionLayout]:
    """The layouts of a batch of `batch` sequences, with the tensor sizes of training (fixed sizes on a GPU). The sample
    is repeated if it has fewer sequences. Where ranks share sequences, the layouts are those of a rank in the middle,
    which receives tokens from both sides."""
    document = sample.document.repeat(-(-batch // len(sample.document)), 1)[:batch]
    tokens = Axis.tokens(document.shape[1], document)
    patterns, block, fixed = sample.model.patterns, sample.model.plan.block, document.is_cuda
    ranks, context = sample.config["trainer"]["context_parallel"], None
    if ranks > 1:
        context = share_sequences(patterns, block, StandInGroup(ranks, ranks // 2), document.shape[1])
    return build_layouts(patterns, tokens, block, fixed, context)

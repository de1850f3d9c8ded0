"""Measures with PyTorch's profiler how a training step uses the time of the device.

`trainer.profile=N` records N steps, the first of which is step FIRST_STEP + 1 of the session. The run's folder then
holds profile.json, with the numbers of StepProfile, and trace.json.gz, a timeline that https://ui.perfetto.dev opens.
"""

import logging
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from model.training.efficiency import SKIPPED_STEPS, Efficiency
from model.training.storage import write_json

log = logging.getLogger(__name__)

FIRST_STEP = SKIPPED_STEPS + 5
"""Steps of a session before the profile: compilation, allocation, and NCCL's first calls are over by then."""

Interval = tuple[float, float]


@dataclass(frozen=True)
class StepProfile:
    """Times of one step in milliseconds, each the mean over the recorded steps.

    step: wall time. busy: time in which the device runs a kernel or copies memory. communication: time in which it
    runs a collective of NCCL. exposed: the part of `communication` in which it runs nothing else. kernels: name, time
    and number of calls of each kernel, longest first.
    """

    step: float
    busy: float
    communication: float
    exposed: float
    kernels: list[tuple[str, float, float]]

    def __str__(self) -> str:
        shares = f"device busy {self.busy / self.step:.1%}"
        if self.communication:
            shares += f", communication {self.communication:.1f} ms, of which {self.exposed:.1f} ms alone"
        return f"{self.step:.1f} ms a step, {shares}"

    def table(self, rows: int = 30) -> str:
        """Returns the longest kernels as a table in Markdown."""
        total = sum(spent for _, spent, _ in self.kernels)
        lines = ["| ms a step | share | calls | kernel |", "|---|---|---|---|"]
        for name, spent, calls in self.kernels[:rows]:
            lines.append(f"| {spent:.2f} | {spent / total:.1%} | {calls:.0f} | {name[:90]} |")
        return "\n".join(lines)


def record(on_host: bool = False) -> profile:
    """Returns a profiler of the GPU, or of the CPU if there is no GPU or `on_host`. It is a context manager."""
    on_gpu = torch.cuda.is_available() and not on_host
    return profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU])


def host_table(profiler: profile, seconds: float, steps: int) -> str:
    """Returns a table in Markdown of the 20 operators that take most of the host's time, each without those that it
    calls. The rest of a step is Python's. profiler: it recorded `steps` steps in `seconds`, and slows the host down."""
    spent = [
        (event.self_cpu_time_total / 1e3 / steps, event.count / steps, event.key) for event in profiler.key_averages()
    ]
    spent.sort(reverse=True)
    total = sum(each for each, _, _ in spent)
    lines = [f"host: {1e3 * seconds / steps:.1f} ms a step with the profiler, of which {total:.1f} ms in operators", ""]
    lines += ["| ms a step | share | calls | operator |", "|---|---|---|---|"]
    lines += [f"| {each:.2f} | {each / total:.1%} | {calls:.0f} | {name[:90]} |" for each, calls, name in spent[:20]]
    return "\n".join(lines)


def step_profile(profiler: profile, seconds: float, steps: int) -> StepProfile:
    """Returns the result of a profiler that recorded `steps` steps in `seconds`. On a CPU, operators count as kernels,
    and `busy` is the sum of their own times."""
    averages = profiler.key_averages()
    on_gpu = any(event.device_type == DeviceType.CUDA for event in averages)
    spent = lambda event: event.self_device_time_total if on_gpu else event.self_cpu_time_total  # noqa: E731
    kernels = [(event.key, spent(event) / 1e3 / steps, event.count / steps) for event in averages if spent(event)]
    kernels.sort(key=lambda kernel: -kernel[1])
    busy, communication, exposed = sum(kernel[1] for kernel in kernels), 0.0, 0.0
    if on_gpu:
        timeline = [event for event in profiler.events() if event.device_type == DeviceType.CUDA]
        collective = [(e.time_range.start, e.time_range.end) for e in timeline if e.name.startswith("nccl")]
        others = [(e.time_range.start, e.time_range.end) for e in timeline if not e.name.startswith("nccl")]
        covered = [length(intervals) / 1e3 / steps for intervals in (collective + others, collective, others)]
        busy, communication, exposed = covered[0], covered[1], covered[0] - covered[2]
    return StepProfile(1e3 * seconds / steps, busy, communication, exposed, kernels)


def length(intervals: Iterable[Interval]) -> float:
    """Returns the length of the union of intervals (start, end)."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(intervals):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


class StepProfiler(Callback):
    """Profiles `steps` optimizer steps of the first rank, and writes the result to `folder`. The speeds that
    `efficiency` measures leave these steps out. Warns if the session ends before the profile is whole."""

    def __init__(self, steps: int, folder: Path, efficiency: Efficiency) -> None:
        self.steps, self.folder, self.efficiency = steps, folder, efficiency
        self.done = 0  # steps of this session
        self.profiler: profile | None = None

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, *_: Any) -> None:
        if self.done == FIRST_STEP and not self.efficiency.held:
            self.efficiency.hold(module)  # on all ranks, which wait for the first one
            if trainer.is_global_zero:
                self.profiler = record()
                self.profiler.__enter__()
                self.started = time.perf_counter()

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, *_: Any) -> None:
        self.done += module.stepped
        if self.done != FIRST_STEP + self.steps or not self.efficiency.held:
            return
        if self.profiler is not None:
            if module.device.type == "cuda":
                torch.cuda.synchronize(module.device)
            seconds = time.perf_counter() - self.started
            self.profiler.__exit__(None, None, None)
            result = step_profile(self.profiler, seconds, self.steps)
            write_json(self.folder / "profile.json", {"steps": self.steps, **asdict(result)})
            self.profiler.export_chrome_trace(str(self.folder / "trace.json.gz"))
            log.info("%s: %s", result, self.folder / "profile.json")
        self.efficiency.release()

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        if trainer.is_global_zero and self.done < FIRST_STEP + self.steps:
            log.warning(
                "trainer.profile=%d: this session wrote no profile: one takes %d steps, and the session had %d",
                *(self.steps, FIRST_STEP + self.steps, self.done),
            )

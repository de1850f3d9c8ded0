"""The cost of a run: speed, memory, computed attention, and utilization of the device.

Time is measured over windows between two logged steps. Reading the loss at a logged step waits for the device, so the
wall time of a window is the device's time, and the steps in between need not wait. The clock stops during validations,
checkpoints and profiles; the first steps of a session (compilation, allocation) do not count.

Attention is counted from the layouts of the batch of the logged step: its visible pairs and its computed tiles. The
last step of a phase (phases.py) is logged, so that no window has steps of two phases.
"""

import re
import statistics
import time
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.profilers import PassThroughProfiler

from model.training.memory_use import bytes_of_others, peak_memory_bytes, reset_peak_memory
from model.training.step_graph import GraphRecorder

SKIPPED_STEPS = 3
"""First steps of a session, which are not measured."""

# Dense bf16 tensor-core peaks (FLOP/s) from NVIDIA's data sheets, without sparsity. The first key that occurs in the
# name of the device counts.
PEAK_FLOPS = {
    "B200": 2250e12,
    "H200 NVL": 835e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "A10": 125e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
}

COSTS = ("density_pairs", "density_tiles", "attention_flops_per_token", "flops_per_token")
"""Numbers that are averaged over the logged steps of all sessions, so that interruptions don't change them."""

SESSION_RATIOS = ("data_wait_share", "mfu_exact", "mfu_dense_equivalent")
"""Numbers that are averaged over the measured seconds of a session."""


def peak_flops(device: torch.device, precision: str) -> float | None:
    """Returns the peak FLOP/s of one device in half precision; None where it is unknown."""
    if device.type != "cuda" or not precision.startswith(("bf16", "16")):
        return None
    name = torch.cuda.get_device_name(device)
    if "MIG" in name:  # a slice of a device
        return None
    return next((flops for key, flops in PEAK_FLOPS.items() if re.search(rf"\b{key}\b", name)), None)


class FetchTimer(PassThroughProfiler):
    """Sums the seconds that the training loop waits for its next batch. Only a profiler receives the start and end of
    that wait from Lightning."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds = 0.0

    def start(self, action_name: str) -> None:
        if action_name.endswith("train_dataloader_next"):
            self.started = time.perf_counter()

    def stop(self, action_name: str) -> None:
        if action_name.endswith("train_dataloader_next"):
            self.seconds += time.perf_counter() - self.started


class Efficiency(Callback):
    """Measures a run. metrics.Recorder reads the numbers of a logged step, fit() those of the session."""

    def __init__(self, fetch_timer: FetchTimer):
        self.fetch_timer = fetch_timer
        self.windows: list[dict[str, float]] = []
        self.costs = dict.fromkeys(COSTS, 0.0)  # sums over the logged steps of all sessions
        self.logged = 0  # number of these steps
        self.earlier_phases: list[tuple[int, dict[str, float]]] = []  # tokens and mean costs of each
        self.device = torch.device("cpu")  # of the training; Lightning moves the module away after it
        self.recorder: GraphRecorder | None = None  # as the module's
        self.train_tokens = 0  # positions, over all ranks and sessions
        self.earlier_seconds = 0.0  # training time of earlier sessions
        self.counted = 0.0  # seconds of the finished windows of all sessions
        self.other_bytes: int | None = None  # the most that `bytes_of_others` returned, over all sessions
        self.session_started = time.perf_counter()
        self.session_steps = 0
        self.held = False
        self._new_window()

    def _new_window(self) -> None:
        self.seconds, self.running_since = 0.0, None if self.held else time.perf_counter()
        self.fetched_at_pause = self.fetch_timer.seconds
        self.fetched_before = self.fetch_timer.seconds
        self.steps = self.tokens = 0

    # The clock

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        self.session_started = time.perf_counter()
        self.device = module.device
        reset_peak_memory(module.device)
        self._look_for_others()

    def _look_for_others(self) -> None:
        """Updates `other_bytes`. Called only while no speed is measured, since asking the device takes time."""
        found = [count for count in (self.other_bytes, bytes_of_others(self.device)) if count is not None]
        self.other_bytes = max(found, default=None)

    def on_train_batch_start(self, *_: Any) -> None:
        if self.running_since is None and not self.held:
            self.running_since = time.perf_counter()
            self.fetched_before += self.fetch_timer.seconds - self.fetched_at_pause

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, *_: Any) -> None:
        tokens = module.batch_tokens * trainer.world_size
        self.train_tokens += tokens
        self.tokens += 0 if self.held else tokens
        if module.stepped:
            self.steps += not self.held
            self.session_steps += 1
            if self.session_steps == SKIPPED_STEPS:
                self._wait(module)
                self._new_window()

    def on_validation_start(self, trainer: Trainer, module: LightningModule) -> None:
        self._pause(module)
        self._look_for_others()

    def on_save_checkpoint(self, trainer: Trainer, module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._pause(module)
        self._look_for_others()

    def hold(self, module: LightningModule) -> None:
        """Leaves the steps from this one on out of all speeds, until `release`."""
        self._pause(module)
        self.held = True

    def release(self) -> None:
        self.held = False

    def _pause(self, module: LightningModule) -> None:
        """Stops the clock until the next training batch."""
        if self.running_since is not None:
            self._wait(module)
            self.seconds += time.perf_counter() - self.running_since
            self.running_since = None
            self.fetched_at_pause = self.fetch_timer.seconds

    def _wait(self, module: LightningModule) -> None:
        if module.device.type == "cuda":
            torch.cuda.synchronize(module.device)

    # The numbers

    def measure(self, module: LightningModule) -> dict[str, float]:
        """Ends the window at a logged step and returns its numbers. The caller has waited for the device."""
        seconds = self._window_seconds()
        values = self._cost(module)
        self.costs = {key: total + values[key] for key, total in self.costs.items()}
        self.logged += 1
        if self.session_steps > SKIPPED_STEPS and self.steps:
            rate = self.tokens / seconds
            values |= {
                "tokens_per_second": rate,
                "step_seconds": seconds / self.steps,
                "data_wait_share": (self._fetched() - self.fetched_before) / seconds,
            }
            peak = peak_flops(module.device, module.trainer.precision)
            if peak is not None:
                per_flop = rate / (peak * module.trainer.world_size)
                values["mfu_exact"] = values["flops_per_token"] * per_flop
                values["mfu_dense_equivalent"] = values["dense_flops_per_token"] * per_flop
            self.windows.append(values | {"seconds": seconds, "tokens": self.tokens})
        if self.session_steps >= SKIPPED_STEPS:
            self.counted += seconds
            self._new_window()
        self.recorder = module.recorder
        return values | {"peak_memory_bytes": self._peak_memory()}

    def _peak_memory(self) -> int:
        return peak_memory_bytes(self.device) if self.recorder is None else self.recorder.peak_memory_bytes()

    def end_phase(self) -> None:
        """Ends a phase, at a logged step. The costs of a run are the means of its phases, weighted by tokens."""
        self.earlier_phases.append((self._phase_tokens(), {key: x / self.logged for key, x in self.costs.items()}))
        self.costs, self.logged = dict.fromkeys(COSTS, 0.0), 0

    def _phase_tokens(self) -> int:
        return self.train_tokens - sum(tokens for tokens, _ in self.earlier_phases)

    def _mean_costs(self) -> dict[str, float | None]:
        """The mean of each cost over the logged steps of each phase, weighted by the phases' tokens."""
        means = {key: total / self.logged if self.logged else None for key, total in self.costs.items()}
        if not self.earlier_phases:
            return means
        phases = [*self.earlier_phases, *([(self._phase_tokens(), means)] if self.logged else [])]
        tokens = sum(tokens for tokens, _ in phases)
        return {key: sum(of_phase * costs[key] for of_phase, costs in phases) / tokens for key in COSTS}

    def elapsed(self) -> float:
        """Returns the seconds of training of all sessions, without first steps, validations and saves."""
        if self.session_steps < SKIPPED_STEPS:
            return self.counted
        return self.counted + self._window_seconds()

    def _window_seconds(self) -> float:
        """Seconds of the current window. The clock stands if a callback has saved within this step."""
        running = 0.0 if self.running_since is None else time.perf_counter() - self.running_since
        return self.seconds + running

    def _fetched(self) -> float:
        """Returns the seconds of waiting for batches in all windows, without those in which the clock stands."""
        return self.fetched_at_pause if self.running_since is None else self.fetch_timer.seconds

    def _cost(self, module: LightningModule) -> dict[str, float]:
        cost, tokens = module.step_cost()
        return {
            "density_pairs": cost.attention.density_pairs,
            "density_tiles": cost.attention.density_tiles,
            "attention_flops_per_token": cost.attention.flops / tokens,
            "flops_per_token": cost.flops / tokens,
            "dense_flops_per_token": cost.dense_flops / tokens,
        }

    def summary(self) -> dict[str, Any]:
        """Returns the entries of summary.json. Speeds are those of this session; costs, tokens and seconds those of all
        sessions. A number that cannot be measured (too few steps, a device with an unknown peak) is None."""
        seconds = sum(window["seconds"] for window in self.windows)

        def time_average(key: str) -> float | None:
            if not self.windows or key not in self.windows[-1]:
                return None
            return sum(window[key] * window["seconds"] for window in self.windows) / seconds

        return {
            "tokens_per_second": sum(window["tokens"] for window in self.windows) / seconds if seconds else None,
            "step_seconds": statistics.median(w["step_seconds"] for w in self.windows) if self.windows else None,
            "peak_memory_bytes": self._peak_memory(),
            "memory_bytes_of_others": self.other_bytes,
            **{key: time_average(key) for key in SESSION_RATIOS},
            **self._mean_costs(),
            "train_tokens": self.train_tokens,
            "train_seconds": self._train_seconds(),
            "measured_seconds": self.elapsed(),
        }

    def _train_seconds(self) -> float:
        return self.earlier_seconds + time.perf_counter() - self.session_started

    def state_dict(self) -> dict[str, Any]:
        return {
            "train_tokens": self.train_tokens,
            "train_seconds": self._train_seconds(),
            "measured_seconds": self.elapsed(),
            "costs": self.costs,
            "logged": self.logged,
            "earlier_phases": self.earlier_phases,
            "other_bytes": self.other_bytes,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.train_tokens, self.earlier_seconds = state_dict["train_tokens"], state_dict["train_seconds"]
        self.counted = state_dict.get("measured_seconds", 0.0)  # early checkpoints have none
        self.costs, self.logged = state_dict.get("costs", self.costs), state_dict.get("logged", 0)
        self.earlier_phases = state_dict.get("earlier_phases", [])
        self.other_bytes = state_dict.get("other_bytes")

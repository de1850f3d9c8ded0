"""The time of a step, from a short table of the rates that a device was measured at.

    seconds of a micro-batch = linear FLOPs / linear rate + attention FLOPs in tiles / attention rate + fixed

Rates are those of (device, precision, compiled or not). `scripts/benchmark.py calibrate` measures steps of several
shapes, fits the three numbers by least squares, and writes them to docs/results/calibration.json.
"""

import json
import platform
from pathlib import Path
from typing import Any

import torch

from kernels.cost import TRAINING_FLOPS
from scripts.forecasting.sampling import Sample

TABLE = Path(__file__).parents[2] / "docs" / "results" / "calibration.json"
COMMAND = "python scripts/benchmark.py calibrate"


def work(sample: Sample) -> tuple[float, float]:
    """FLOPs of one micro-batch on one device: in matrices, and in the tiles of attention."""
    batch = sample.config["data"]["batch_size"] / len(sample.document)
    cost = sample.cost
    linear = cost.flops - cost.attention.flops
    return batch * linear, batch * TRAINING_FLOPS * sample.model.config.head_dim * cost.attention.tile_pairs


def setting(config: Any, device: torch.device) -> str:
    """What rates depend on, besides the shapes."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    compiled = ", compiled" if config["trainer"]["compile"] else ""
    return f"{name}, {config['trainer']['precision']}{compiled}"


def _processor() -> str:
    """Its name, where the system tells (Linux), and the threads that PyTorch uses of it."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor() or 'CPU'}, {torch.get_num_threads()} threads"


def step_seconds(sample: Sample) -> float | None:
    """Of one optimizer step; None where the table has no such device and precision."""
    rows = json.loads(TABLE.read_text())["rates"] if TABLE.exists() else {}
    rates = rows.get(setting(sample.config, sample.document.device))
    if rates is None:
        return None
    linear, attention = work(sample)
    micro_batch = linear / rates["linear"] + attention / rates["attention"] + rates["fixed"]
    return sample.config["trainer"]["accumulate"] * micro_batch

"""Devices and dtypes behind the names that Lightning uses for accelerators and precisions."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

DTYPES = {"64-true": torch.float64, "bf16-true": torch.bfloat16}
"""The dtype of the weights by precision; float32 for every other precision."""

AUTOCAST = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
"""The dtype of autocast by precision; no autocast for every other precision."""

FP8 = ("mlp", "mlp_and_head")
"""The products that `trainer.fp8` computes in 8 bits; false for none."""

OF_THE_MODEL = ("compile", "fp8")
"""Keys of a `trainer` group that change how the model computes. They are no arguments of fit()."""

SHARDED = "fsdp2"
"""The `trainer.strategy` that shards the model over the devices (training/strategies.py)."""


def device_of(accelerator: str) -> torch.device:
    """Returns the device that an accelerator (cpu, cuda, gpu or auto) stands for on this machine."""
    return torch.device("cuda" if accelerator in ("cuda", "gpu", "auto") and torch.cuda.is_available() else "cpu")


def devices_of(trainer: Mapping[str, Any]) -> int:
    """Returns how many devices a `trainer` group trains on, on all nodes together. `devices` is a number, a list of
    indices, or -1 or "auto" for every device of this machine (a CPU is one device), as in Lightning."""
    devices, nodes = trainer["devices"], trainer["nodes"]
    if isinstance(devices, list):
        return nodes * len(devices)
    if str(devices) in ("-1", "auto"):
        on_gpu = trainer["accelerator"] != "cpu" and torch.cuda.is_available()
        return nodes * (torch.cuda.device_count() if on_gpu else 1)
    return nodes * int(devices)


def describe_device(trainer: Mapping[str, Any]) -> str:
    """The device, precision and compilation that the settings of a trainer choose, in words."""
    in_fp8 = f"fp8 in {trainer['fp8'].replace('_', ' ')}" if trainer["fp8"] else None
    device = device_of(trainer["accelerator"])
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    compiled = "compiled" if trainer["compile"] else None
    return ", ".join(filter(None, [name, trainer["precision"], in_fp8, compiled]))


def autocast(model: nn.Module, precision: str) -> torch.autocast:
    """Returns the autocast context of `precision` on the device of the model's parameters."""
    dtype = AUTOCAST.get(precision)
    return torch.autocast(next(model.parameters()).device.type, dtype, enabled=dtype is not None)

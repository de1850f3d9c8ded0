"""Checks `trainer.cuda_graph`, and resolves `auto`: which training steps can be replayed from a CUDA graph."""

import logging
from collections.abc import Mapping
from typing import Any

from configs.errors import refused
from kernels.dispatch import CAPTURABLE, has_triton

log = logging.getLogger(__name__)


def check_cuda_graph(config: Mapping[str, Any]) -> None:
    """Raises ConfigError for `trainer.cuda_graph=true` where a step cannot be replayed from a CUDA graph."""
    reason = refusal(config) if config["trainer"]["cuda_graph"] is True else None
    if reason:
        raise refused("trainer.cuda_graph", True, f"false or auto {reason}")


def resolve_cuda_graph(
    config: Mapping[str, Any], forecast: Mapping[str, Any] | None = None, log_reason: bool = False
) -> bool | str:
    """Returns the value of `trainer.cuda_graph` for fit(). `auto` becomes false if a step cannot be replayed, or if a
    step in a graph is forecast to exceed the memory of the device.

    forecast: the run's forecast as in summary.json, if there is one. It has no graph if one would exceed the memory.
    log_reason: log why, on a GPU.

    Raises:
        ConfigError: as `check_cuda_graph`.
    """
    from model.precision import device_of

    check_cuda_graph(config)
    wanted = config["trainer"]["cuda_graph"]
    reason = refusal(config) if wanted == "auto" else None
    if wanted == "auto" and not reason and forecast and not forecast["cuda_graph"]:
        reason = "where a step in a graph is forecast to exceed the memory of the device"
    if not reason:
        return wanted
    if log_reason and device_of(config["trainer"]["accelerator"]).type == "cuda":
        log.info("trainer.cuda_graph=auto: false, as always %s", reason)
    return False


def refusal(config: Mapping[str, Any]) -> str | None:
    """Returns why a step cannot be replayed, as a phrase such as "on a CPU" that ends an error message; None if it can
    be replayed."""
    from model.precision import device_of, devices_of

    trainer, backend = config["trainer"], config["attention"]["backend"]
    checkpointing = config["model"]["activation_checkpointing"]
    if device_of(trainer["accelerator"]).type == "cpu":
        return "on a CPU"
    if devices_of(trainer) > 1:
        return "on several devices"
    if trainer["strategy"] != "auto":
        return f"with trainer.strategy={trainer['strategy']}"
    if trainer["precision"].startswith("16"):  # it multiplies the loss by a number that the host changes
        return f"with trainer.precision={trainer['precision']}"
    if backend not in ("auto", *CAPTURABLE):
        return f"with attention.backend={backend}, and true with auto, {', '.join(CAPTURABLE)}"
    missing = _missing_kernels(config)
    if missing:  # `auto` then runs plain PyTorch, which reads values on the host
        return f"where Triton's kernels cannot run: {missing}"
    if checkpointing and not trainer["compile"]:  # PyTorch's checkpoint() then reads the state of random generators
        return "with model.activation_checkpointing and trainer.compile=false"
    return None


def _missing_kernels(config: Mapping[str, Any]) -> str | None:
    """Returns why Triton's attention kernels do not support this model on this GPU; None if they do."""
    import torch

    from model.precision import AUTOCAST, DTYPES, device_of

    if not has_triton():
        return "the package triton is not installed"
    from kernels.backends.triton.common import unsupported

    precision = config["trainer"]["precision"]
    dtype = AUTOCAST.get(precision) or DTYPES.get(precision, torch.float32)
    return unsupported(device_of(config["trainer"]["accelerator"]), dtype, config["model"]["head_dim"])

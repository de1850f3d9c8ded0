"""Checks `trainer.cuda_graph`, and resolves `auto`: which training steps can be replayed from a CUDA graph."""

import logging
from collections.abc import Mapping
from typing import Any

from configs.errors import refused

log = logging.getLogger(__name__)

BACKENDS = ("auto", "triton", "hopper")
"""Those whose kernels can be captured: the others read values on the host, or compile for each layout."""


def check_cuda_graph(config: Mapping[str, Any]) -> None:
    """Raises ConfigError for `trainer.cuda_graph=true` where a step cannot be replayed from a CUDA graph."""
    reason = refusal(config)
    if config["trainer"]["cuda_graph"] is True and reason:
        raise refused("trainer.cuda_graph", True, f"false or auto {reason}")


def resolve_cuda_graph(config: Mapping[str, Any], log_reason: bool = False) -> bool | str:
    """Returns `trainer.cuda_graph` of a checked config as fit() takes it: `auto` becomes false where a step cannot be
    replayed. log_reason: write a line to the log where that is so on a GPU."""
    from model.precision import device_of

    wanted, reason = config["trainer"]["cuda_graph"], refusal(config)
    if wanted != "auto" or not reason:
        return wanted
    if log_reason and device_of(config["trainer"]["accelerator"]).type == "cuda":
        log.info("trainer.cuda_graph=auto: false, as always %s", reason)
    return False


def refusal(config: Mapping[str, Any]) -> str | None:
    """Returns where `trainer.cuda_graph` must be false or auto, as the end of a sentence; None if a step can be
    replayed."""
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
    if backend not in BACKENDS:
        return f"with attention.backend={backend}, and true with {', '.join(BACKENDS)}"
    if checkpointing and not trainer["compile"]:  # PyTorch's checkpoint() then reads the state of random generators
        return "with model.activation_checkpointing and trainer.compile=false"
    return None

"""The settings of every command: YAML groups that Hydra composes, the checks of a composed config, and the functions
that build objects from it."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from omegaconf import OmegaConf

_on_any_machine: ContextVar[bool] = ContextVar("on_any_machine", default=False)


def on_gpu(gpu: Any, cpu: Any) -> Any:
    """Returns the first value on a machine with a CUDA device, else the second: `${on_gpu:cuda,cpu}` in a config."""
    if _on_any_machine.get():
        return cpu
    import torch

    return gpu if torch.cuda.is_available() else cpu


@contextmanager
def on_any_machine() -> Iterator[None]:
    """While inside, `${on_gpu:...}` has its value for a CPU, without the seconds that it takes to import PyTorch. Both
    values have types that the key accepts, so that the types of a config can be checked first."""
    before = _on_any_machine.set(True)
    try:
        yield
    finally:
        _on_any_machine.reset(before)


OmegaConf.register_new_resolver("on_gpu", on_gpu, replace=True)

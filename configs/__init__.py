"""The settings of every command: YAML groups that Hydra composes, the types and checks of the result, and the objects
that it describes."""

from typing import Any

from omegaconf import OmegaConf


def on_gpu(gpu: Any, cpu: Any) -> Any:
    """The first value on a machine with a CUDA device, otherwise the second: `${on_gpu:cuda,cpu}` in a config."""
    import torch

    return gpu if torch.cuda.is_available() else cpu


OmegaConf.register_new_resolver("on_gpu", on_gpu, replace=True)

"""The settings of every command: YAML groups that Hydra composes, the checks of a composed config, and the functions
that build objects from it."""

from typing import Any

from omegaconf import OmegaConf


def on_gpu(gpu: Any, cpu: Any) -> Any:
    """Returns the first value on a machine with a CUDA device, else the second: `${on_gpu:cuda,cpu}` in a config."""
    import torch

    return gpu if torch.cuda.is_available() else cpu


OmegaConf.register_new_resolver("on_gpu", on_gpu, replace=True)

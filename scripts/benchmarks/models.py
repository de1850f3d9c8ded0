"""The models that are measured: those of the configs, with random weights."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from model import Transformer


def composed(*overrides: str) -> "dict[str, Any]":
    """The training config that a command line composes, as plain dicts."""
    from hydra import compose, initialize_config_dir
    from omegaconf import OmegaConf

    from configs.trust import trust_named

    configs = str(Path(__file__).parents[2] / "configs")
    with initialize_config_dir(version_base="1.3", config_dir=configs):
        return trust_named(OmegaConf.to_container(compose("train", overrides=list(overrides)), resolve=True))


def untrained(attention: str, model: str) -> "tuple[Transformer, dict[str, Any]]":
    """Returns (a model with random weights, its whole config) for the choices `attention` and `model` of configs/. The
    model is on the GPU if there is one."""
    import torch

    from configs.build import build_model

    config = composed(f"attention={attention}", f"model={model}")
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return build_model(config, config["data"]["tokenizer"]["vocabulary"]).to(device), config

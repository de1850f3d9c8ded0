"""The language model: transformer, decoding, training and evaluation. Imports kernels, and neither data nor configs."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from model.config import AttentionPlan, ModelConfig
    from model.decoding import Cache, Sampling, generate
    from model.transformer import Transformer

# Imported on first use, so that a command that only opens a run folder does not wait for torch.
_WHERE = {
    "AttentionPlan": "config",
    "Cache": "decoding",
    "ModelConfig": "config",
    "Sampling": "decoding",
    "Transformer": "transformer",
    "generate": "decoding",
}
__all__ = ["AttentionPlan", "Cache", "ModelConfig", "Sampling", "Transformer", "generate"]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_WHERE[name]}", __name__), name)

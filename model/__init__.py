"""The language model: transformer, training and evaluation. Knows kernels, not where data comes from."""

from model.config import AttentionPlan, ModelConfig
from model.transformer import Transformer

__all__ = ["AttentionPlan", "ModelConfig", "Transformer"]

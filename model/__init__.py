"""The language model: transformer, decoding, training and evaluation. Imports kernels, and neither data nor configs."""

from model.config import AttentionPlan, ModelConfig
from model.decoding import Cache, Sampling, generate
from model.transformer import Transformer

__all__ = ["AttentionPlan", "Cache", "ModelConfig", "Sampling", "Transformer", "generate"]

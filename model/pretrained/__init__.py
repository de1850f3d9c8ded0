"""Models in Hugging Face's format: Qwen3, Llama, Mistral and Ministral.

names.py             the names of parameters, there and here
config_file.py       config.json -> sizes, and the window of each layer
rope_parameters.py   the rotary embeddings of config.json
weights.py           safetensors files -> parameters
"""

from model.pretrained.config_file import Architecture, read_architecture
from model.pretrained.errors import PretrainedError
from model.pretrained.weights import Weights

__all__ = ["Architecture", "PretrainedError", "Weights", "read_architecture"]

"""Models in Hugging Face's format: Qwen3, Qwen2, Llama, Mistral, Ministral and SmolLM3.

names.py                the names of parameters, there and here
config_file.py          config.json -> sizes, and the window of each layer
rope_parameters.py      the rotary embeddings of config.json
weights.py              safetensors files -> parameters
export.py               a model -> a folder
plan_settings.py        the patterns in config.json, where no class of transformers has them
attention_interface.py  those patterns in transformers

Imports are explicit (`from model.pretrained.weights import Weights`), so that reading config.json imports no
torch.
"""

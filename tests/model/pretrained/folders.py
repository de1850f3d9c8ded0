"""Folders in Hugging Face's format, written without transformers."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from data.tokenizers import BPE
from model import ModelConfig, Transformer
from model.pretrained.config_file import read_architecture
from model.pretrained.names import to_hugging_face
from tests.model.small import lively, plan

CONFIG: dict[str, Any] = dict(
    architectures=["MistralForCausalLM"],
    model_type="mistral",
    vocab_size=320,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=128,
    sliding_window=24,
    rope_theta=500.0,
    tie_word_embeddings=False,
    torch_dtype="float32",
)
TEXT = "the river under the stone walked over seven quiet nights and the wind of the light"


def write_folder(folder: Path, vocabulary: int = 300, **changes: Any) -> Path:
    """A Mistral with random weights, and a tokenizer of at most `vocabulary` tokens. `changes`: keys of config.json."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(CONFIG | changes))
    settings = read_architecture(folder).settings
    own = ModelConfig(**settings, sink_logits=False, activation_checkpointing=False, z_loss=0.0)
    model = lively(Transformer(own, plan()))
    weights = {to_hugging_face(name): value.detach() for name, value in model.named_parameters()}
    save_file(weights, folder / "model.safetensors")
    tokenizer = BPE(vocabulary)
    tokenizer.fit([TEXT])
    tokenizer.save(folder / "tokenizer.json")
    return folder


def weights_in(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of a folder's single file, under Hugging Face's names."""
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")

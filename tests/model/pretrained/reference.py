"""Tiny models of transformers with random weights, as folders that its save_pretrained writes."""

from pathlib import Path
from typing import Any

import pytest
import torch

from kernels.patterns import Dense, Pattern, Window
from model import AttentionPlan, ModelConfig, Transformer
from model.pretrained.config_file import Architecture, read_architecture
from model.pretrained.weights import Weights

transformers = pytest.importorskip("transformers")

SIZES: dict[str, Any] = dict(
    vocab_size=96,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    initializer_range=0.1,
    rms_norm_eps=1e-5,
    pad_token_id=None,
    bos_token_id=0,
    eos_token_id=0,
)

CLASSES = {
    "qwen3": "Qwen3",
    "qwen2": "Qwen2",
    "llama": "Llama",
    "mistral": "Mistral",
    "ministral": "Ministral",
    "smollm3": "SmolLM3",
}


def their_model(kind: str, seed: int = 0, **changes: Any) -> Any:
    """A model of transformers with random weights, norms and biases included, in evaluation mode."""
    settings = getattr(transformers, f"{CLASSES[kind]}Config")(**SIZES | changes)
    torch.manual_seed(seed)
    model = getattr(transformers, f"{CLASSES[kind]}ForCausalLM")(settings)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5, generator=generator)
        elif name.endswith("bias"):
            torch.nn.init.normal_(parameter, generator=generator)
    return model.eval()


def saved(model: Any, folder: Path, **arguments: Any) -> Path:
    """The folder of a model of transformers."""
    model.save_pretrained(folder, **arguments)
    return folder


def our_model(folder: Path, **changes: Any) -> Transformer:
    """Our model of a folder, with its weights."""
    architecture = read_architecture(folder)
    given = dict(sink_logits=False, activation_checkpointing=False, z_loss=0.0) | changes
    config = ModelConfig(**architecture.settings | given)
    model = Transformer(config, plan_of(architecture))
    Weights(folder).load(model)
    return model.eval()


def plan_of(architecture: Architecture) -> AttentionPlan:
    """A pattern of its own for each layer."""
    windows = {str(layer): width for layer, width in enumerate(architecture.windows)}
    patterns: dict[str, Pattern] = {
        name: Dense() if width is None else Window(width) for name, width in windows.items()
    }
    rope = {str(layer): "none" for layer in architecture.unrotated}
    return AttentionPlan(patterns=patterns, schedule=list(patterns), block=16, backend="auto", rope=rope)


@torch.no_grad()
def their_logits(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    return model(tokens, use_cache=False).logits


@torch.no_grad()
def our_logits(
    model: Transformer,
    tokens: torch.Tensor,
    document: torch.Tensor | None = None,
    position: torch.Tensor | None = None,
) -> torch.Tensor:
    position = torch.arange(tokens.shape[1])[None] if position is None else position
    return model.logits(model(tokens, position, model.build_layouts(document, tokens.shape[1])))

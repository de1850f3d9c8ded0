"""Writes a model as a folder that Hugging Face's transformers loads: its configs, safetensors and tokenizer.

config.json names the class Qwen3ForCausalLM, whose parameters are ours (names.py). Without `qk_norm` it is the class of
Qwen2 (with `qkv_bias`), of Llama, Mistral or Ministral, or of SmolLM3 if some layers have no rotary embeddings. Layers
have full attention or a sliding window, which is counted as ours: a query sees the last `sliding_window` tokens, itself
included. Of other masks over the tokens config.json holds the settings, under a model type that transformers has once
attention_interface.py is imported.
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from kernels.patterns import Pattern
from model.config import MODEL_ROPE, NO_ROPE, AttentionPlan, ModelConfig
from model.pretrained.config_file import FILE as CONFIG_FILE
from model.pretrained.errors import ExportError
from model.pretrained.names import HEAD, to_hugging_face
from model.pretrained.plan_settings import plan_settings
from model.pretrained.weights import INDEX
from model.rope import RotaryEmbedding
from model.training.storage import replacing_folder
from model.transformer import Transformer

SHARD_BYTES = 5_000_000_000
"""Largest size of one safetensors file, unless a single tensor is larger."""

MASKS = "those of attention=dense, window, dilated, strided, fixed and block_sparse"

STOCK = "attention=dense, or window with sink_tokens=0 and one width in all layers"
"""The patterns that classes of transformers have, in words."""

FARSIGHT = "farsight"
"""Model type and attention function of patterns that no class of transformers has (attention_interface.py)."""

PLAN = "attention_plan"
"""The key of config.json that holds the patterns of such a model."""


def export(
    output: Path,
    model: Transformer,
    tokenizer_files: Mapping[str, str],
    bos: int,
    vocabulary: int,
    dtype: torch.dtype,
    shard_bytes: int = SHARD_BYTES,
) -> list[Path]:
    """Writes the folder `output` whole or not at all, and returns its files.

    Args:
        output: does not exist, or is an empty folder.
        tokenizer_files: file name -> content (data.tokenizers.hugging_face_files).
        bos: the token that begins a document, and so ends the one before it.
        vocabulary: number of tokens of the tokenizer; the model's is at least as large.
        dtype: that of the weights.

    Raises:
        ExportError: transformers has no class that computes this model.
        StorageError: a file cannot be written.
    """
    config = hugging_face_config(model.config, model.plan, bos, dtype)
    texts = {
        CONFIG_FILE: _json(config),
        "generation_config.json": _json(generation_config(model.config, bos, vocabulary)),
        **tokenizer_files,
    }
    weights = hugging_face_weights(model, dtype)
    needed = sum(weight.nbytes for weight in weights.values()) + sum(map(len, texts.values()))
    with replacing_folder(output, needed) as folder:
        for name, text in texts.items():
            (folder / name).write_text(text, encoding="utf-8")
        _write_weights(folder, weights, shard_bytes)
        names = sorted(file.name for file in folder.iterdir())
    return [output / name for name in names]


def hugging_face_config(config: ModelConfig, plan: AttentionPlan, bos: int, dtype: torch.dtype) -> dict[str, Any]:
    """Returns the content of config.json, with RoPE and the dtype in the keys of both transformers 4 and 5.

    Raises:
        ExportError: as `export`.
    """
    if config.sink_logits:
        raise ExportError(
            "model.sink_logits=true: must be false for format=hf, since no class with our layers has sinks"
        )
    if config.qkv_bias and config.qk_norm:
        raise ExportError("model.qkv_bias=true: must be false for format=hf with model.qk_norm=true")
    windows, rotated = layer_windows(config, plan), _rotated_layers(config, plan)
    if windows is None:
        attention = _own_class(config, plan)
    else:
        attention = _class_of_transformers(config, windows) if all(rotated) else _smol_lm3(windows, rotated)
    dtype_name = str(dtype).removeprefix("torch.")
    rope = hugging_face_rope(config)
    scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
    # For "dynamic", transformers reads the original length from max_position_embeddings. It enforces no limit with it.
    longest = config.rope_original_length if config.rope_scaling == "dynamic" else config.max_length
    return attention | {
        "vocab_size": config.vocabulary,
        "hidden_size": config.width,
        "intermediate_size": config.mlp_width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": longest,
        "rms_norm_eps": config.norm_epsilon,
        "tie_word_embeddings": config.tie_embeddings,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "use_cache": True,
        "rope_theta": rope["rope_theta"],
        "rope_scaling": None if rope["rope_type"] == "default" else scaling,
        "rope_parameters": rope,
        "bos_token_id": bos,
        "eos_token_id": bos,
        "torch_dtype": dtype_name,
        "dtype": dtype_name,
    }


def _class_of_transformers(config: ModelConfig, windows: Sequence[int | None]) -> dict[str, Any]:
    """Returns the keys that depend on the class: that of transformers whose layers have these windows."""
    width = next((window for window in windows if window is not None), None)
    types = ["full_attention" if window is None else "sliding_attention" for window in windows]
    if config.qk_norm or config.qkv_bias:
        first = windows.index(width) if width is not None else config.layers
        return {
            "architectures": ["Qwen2ForCausalLM" if config.qkv_bias else "Qwen3ForCausalLM"],
            "model_type": "qwen2" if config.qkv_bias else "qwen3",
            "layer_types": types,
            "use_sliding_window": width is not None,
            "sliding_window": width,
            # Early versions read no layer_types: there, all layers from this one on have the window.
            "max_window_layers": config.layers if None in windows[first:] else first,
        }
    if width is None:
        return {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "mlp_bias": False}
    if None in windows:
        kind = {"architectures": ["MinistralForCausalLM"], "model_type": "ministral", "layer_types": types}
        return kind | {"sliding_window": width}
    return {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": width}


def _rotated_layers(config: ModelConfig, plan: AttentionPlan) -> list[bool]:
    """Returns whether each layer has rotary embeddings.

    Raises:
        ExportError: no class of transformers has such layers.
    """
    for layer in range(config.layers):
        rope = plan.rope_of(layer)
        smol_lm3 = not config.qk_norm and not config.qkv_bias and layer_windows(config, plan) is not None
        if rope != MODEL_ROPE and not (rope == NO_ROPE and smol_lm3):
            needed = f"model.qk_norm=false, model.qkv_bias=false and {STOCK}"
            accepted = f"{MODEL_ROPE} for format=hf; {NO_ROPE} needs {needed}"
            raise ExportError(f"attention.patterns.{plan.entry(layer)}.rope={rope}: must be {accepted}")
    return [plan.rope_of(layer) == MODEL_ROPE for layer in range(config.layers)]


def _smol_lm3(windows: Sequence[int | None], rotated: Sequence[bool]) -> dict[str, Any]:
    """As `_class_of_transformers`, where some layers have no rotary embeddings."""
    width = next((window for window in windows if window is not None), None)
    return {
        "architectures": ["SmolLM3ForCausalLM"],
        "model_type": "smollm3",
        "mlp_bias": False,
        "pad_token_id": None,  # its default is beyond our vocabularies
        "no_rope_layers": [int(each) for each in rotated],  # 0: none, in spite of the name
        "layer_types": ["full_attention" if window is None else "sliding_attention" for window in windows],
        "use_sliding_window": width is not None,
        "sliding_window": width,
    }


def _own_class(config: ModelConfig, plan: AttentionPlan) -> dict[str, Any]:
    """As `_class_of_transformers`, of the class in attention_interface.py."""
    for layer in range(config.layers):
        name, pattern = plan.entry(layer), plan.pattern(layer, config.kv_heads)
        if isinstance(pattern, Pattern) and not pattern.is_mask:
            raise ExportError(
                f"attention.patterns.{name}: must be a mask over the tokens for format=hf, as {MASKS} are"
            )
    if not config.qk_norm:
        raise ExportError(f"model.qk_norm=false: must be true for format=hf with other patterns than {STOCK}")
    try:
        settings = plan_settings(plan)
    except ValueError as error:
        raise ExportError(f"{error} for format=hf") from None
    return {
        "architectures": ["FarsightForCausalLM"],
        "model_type": FARSIGHT,
        "layer_types": ["full_attention"] * config.layers,  # a cache keeps every token
        "use_sliding_window": False,
        "sliding_window": None,
        "max_window_layers": config.layers,
        PLAN: settings,
    }


def layer_windows(config: ModelConfig, plan: AttentionPlan) -> list[int | None] | None:
    """Returns the width of each layer's sliding window, or None in the list for full attention. Returns None if a
    layer has another pattern, or if windows have several widths: no class of transformers has such layers."""
    patterns = [plan.pattern(layer, config.kv_heads) for layer in range(config.layers)]
    if not all(isinstance(pattern, Pattern) and pattern.is_mask for pattern in patterns):
        return None
    widths = [pattern.plain_window(config.max_length) for pattern in patterns]
    if None in widths:
        return None
    windows = [width if width < config.max_length else None for width in widths]
    return windows if len({*windows} - {None}) <= 1 else None


def hugging_face_rope(config: ModelConfig) -> dict[str, Any]:
    """Returns RoPE's settings, with which transformers computes the frequencies of `model.rope` (in float32).

    transformers has no "ntk", which is a larger base, and no "yarn": its "yarn" is our "yarn_hf". The frequencies of
    "yarn" are written one by one, as factors of "longrope" that are equal for short and long sequences.
    """
    half = config.head_dim // 2
    theta = {"rope_theta": config.rope_theta}
    factor = {"factor": config.rope_factor}
    original = {"original_max_position_embeddings": config.rope_original_length}
    match config.rope_scaling:
        case "none":
            return {"rope_type": "default"} | theta
        case "ntk":
            return {"rope_type": "default", "rope_theta": config.rope_theta * config.rope_factor ** (half / (half - 1))}
        case "linear" | "dynamic":
            return {"rope_type": config.rope_scaling} | theta | factor
        case "llama3":
            turns = {"low_freq_factor": config.rope_beta_slow, "high_freq_factor": config.rope_beta_fast}
            return {"rope_type": "llama3"} | theta | factor | original | turns
        case "yarn_hf":
            given = config.rope_attention_factor
            attention = {} if given is None else {"attention_factor": given}
            turns = {"beta_fast": config.rope_beta_fast, "beta_slow": config.rope_beta_slow}
            return (
                {"rope_type": "yarn", "truncate": config.rope_truncate} | theta | factor | original | turns | attention
            )
        case "yarn":
            rotary = RotaryEmbedding(config)
            unscaled = config.rope_theta ** -(torch.arange(half, dtype=torch.float64) / half)
            slower = (unscaled / rotary.frequencies).tolist()
            longrope = {"attention_factor": rotary.magnitude, "short_factor": slower, "long_factor": slower}
            return {"rope_type": "longrope"} | theta | factor | original | longrope
    raise ExportError(f"model.rope_scaling={config.rope_scaling}: must be one that transformers computes for format=hf")


def generation_config(config: ModelConfig, bos: int, vocabulary: int) -> dict[str, Any]:
    """Returns generation_config.json: a text ends where the model begins the next document, and rows of the embedding
    that are no tokens (the vocabulary is rounded up) are never chosen."""
    padding = list(range(vocabulary, config.vocabulary))
    ids = {"bos_token_id": bos, "eos_token_id": bos, "pad_token_id": bos}
    return ids | ({"suppress_tokens": padding} if padding else {})


def hugging_face_weights(model: Transformer, dtype: torch.dtype) -> dict[str, Tensor]:
    """Returns the parameters on the CPU under Hugging Face's names; a tied head is left out."""
    tied = model.config.tie_embeddings
    named = {to_hugging_face(name): value for name, value in model.state_dict().items() if not (tied and name == HEAD)}
    assert None not in named, "hugging_face_config refuses models with other parameters"
    return {name: value.to("cpu", dtype).contiguous() for name, value in named.items()}


def _write_weights(folder: Path, weights: dict[str, Tensor], shard_bytes: int) -> None:
    """Writes model.safetensors, or several files and the index of the tensors in them."""
    split = split_torch_state_dict_into_shards(weights, max_shard_size=shard_bytes)
    for name, tensors in split.filename_to_tensors.items():
        try:
            save_file({tensor: weights[tensor] for tensor in tensors}, folder / name, metadata={"format": "pt"})
        except SafetensorError as error:  # it is no OSError, and has the number in its text alone
            number = re.search(r"os error (\d+)", str(error))
            if number is None:
                raise
            raise OSError(int(number[1]), str(error), str(folder / name)) from error
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / INDEX).write_text(_json(index), encoding="utf-8")


def _json(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"

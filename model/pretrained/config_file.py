"""Reads config.json: the sizes of a Qwen3, Qwen2, Llama, Mistral, Ministral or SmolLM3 model, and the window of each
of its layers; of SmolLM3 also which layers have no rotary embeddings.

A missing key has the default of transformers' class of that model. Keys that change nothing in the forward pass of
these models are not read.
"""

import json
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model.pretrained.errors import PretrainedError, refused
from model.pretrained.rope_parameters import rope_settings

FILE = "config.json"

DEFAULTS: dict[str, dict[str, Any]] = {
    "qwen3": {
        "num_key_value_heads": 32,
        "head_dim": 128,
        "max_position_embeddings": 32768,
        "sliding_window": 4096,
    },
    "qwen2": {
        "num_key_value_heads": 32,
        "head_dim": None,
        "max_position_embeddings": 32768,
        "sliding_window": 4096,
    },
    "llama": {"num_key_value_heads": None, "head_dim": None, "max_position_embeddings": 2048, "sliding_window": None},
    "mistral": {
        "num_key_value_heads": 8,
        "head_dim": None,
        "max_position_embeddings": 131072,
        "sliding_window": 4096,
    },
    "smollm3": {
        "num_key_value_heads": 4,
        "head_dim": None,
        "max_position_embeddings": 32768,
        "sliding_window": None,
        "rope_theta": 2e6,
        "tie_word_embeddings": True,
    },
}
DEFAULTS["ministral"] = DEFAULTS["mistral"]
"""Model type -> transformers' default of each key whose default depends on the model type."""

ONLY = {"attention_bias": False, "mlp_bias": False, "hidden_act": "silu", "attention_dropout": 0}
"""Key -> the one value that our model can compute."""

SWITCHED = ("qwen3", "qwen2", "smollm3")
"""Model types whose windows need use_sliding_window=true."""

WINDOWS = {"full_attention": False, "sliding_attention": True}


@dataclass(frozen=True)
class Architecture:
    """What a config.json determines.

    settings: the fields of ModelConfig that follow from it, under their names.
    windows: for each layer, how many tokens a query sees, itself included; None for all.
    unrotated: the layers without rotary embeddings, counted from 0.
    """

    settings: dict[str, Any]
    windows: tuple[int | None, ...]
    unrotated: frozenset[int] = frozenset()


def read_architecture(folder: Path) -> Architecture:
    """Returns the architecture of the model in `folder`.

    Raises:
        PretrainedError: there is no model that can be read, or a key has a value that our model does not have.
    """
    keys = ConfigFile(folder)
    kind = keys.one_of("model_type", DEFAULTS)
    keys.check_heads()
    for key, accepted in ONLY.items():
        if keys.values.get(key, accepted) not in (accepted, None):
            raise keys.refused(key, json.dumps(accepted))
    default = DEFAULTS[kind]
    width, heads = keys.count("hidden_size"), keys.count("num_attention_heads")
    length = keys.count("max_position_embeddings", default["max_position_embeddings"])
    rope = rope_settings({"rope_theta": default.get("rope_theta")} | keys.values, keys.file, length)
    layers = keys.count("num_hidden_layers")
    unrotated = keys.unrotated(layers) if kind == "smollm3" else frozenset()
    settings = {
        "width": width,
        "layers": layers,
        "heads": heads,
        "kv_heads": keys.count("num_key_value_heads", default["num_key_value_heads"] or heads),
        "head_dim": keys.count("head_dim", default["head_dim"] or width // heads),
        "mlp_width": keys.count("intermediate_size"),
        "vocabulary": keys.count("vocab_size"),
        "max_length": math.floor(length * rope["rope_factor"]) if rope["rope_scaling"] == "dynamic" else length,
        **rope,
        "tie_embeddings": keys.flag("tie_word_embeddings", default.get("tie_word_embeddings", False)),
        "norm_epsilon": keys.number("rms_norm_eps", 1e-6),
        "qk_norm": kind == "qwen3",
        "qkv_bias": kind == "qwen2",
    }
    return Architecture(settings, keys.windows(kind, layers, default["sliding_window"], unrotated), unrotated)


class ConfigFile:
    """The keys of the config.json of `folder`. Each key is checked when it is read.

    Raises:
        PretrainedError: config.json is missing or not JSON, or the folder holds an adapter or quantized weights.
    """

    def __init__(self, folder: Path):
        self.file = folder / FILE
        if (folder / "adapter_config.json").is_file():
            raise PretrainedError(
                f"{folder / 'adapter_config.json'}: must be merged into its base model first (peft's merge_and_unload)"
            )
        try:
            self.values: dict[str, Any] = json.loads(self.file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise PretrainedError(f"{folder}: must hold a {FILE}, the weights and a tokenizer.json") from None
        except ValueError as error:  # not JSON, or not UTF-8
            raise PretrainedError(f"{self.file}: must be JSON: {error}") from None
        if not isinstance(self.values, dict):
            raise PretrainedError(f"{self.file}: must be a JSON object with the keys of a model")
        for key in ("quantization_config", "compression_config"):
            if self.values.get(key) is not None:
                method = self.values[key].get("quant_method") if isinstance(self.values[key], Mapping) else None
                raise PretrainedError(
                    f"{self.file}: {key} (quant_method={json.dumps(method)}): must be left out: give the model's "
                    "checkpoint in bfloat16, float16 or float32"
                )

    def refused(self, key: str, accepted: str) -> PretrainedError:
        return refused(self.file, key, self.values.get(key), accepted)

    def one_of(self, key: str, accepted: Collection[str]) -> str:
        found = self.values.get(key)
        if not isinstance(found, str) or found not in accepted:
            raise self.refused(key, f"one of {', '.join(accepted)}")
        return found

    def count(self, key: str, default: int | None = None, least: int = 1) -> int:
        """An integer of at least `least`; `default` where the key is missing or null."""
        found = self.values.get(key)
        found = default if found is None else found
        if not isinstance(found, int) or isinstance(found, bool) or found < least:
            raise self.refused(key, f"an integer >= {least}")
        return found

    def number(self, key: str, default: float) -> float:
        found = self.values.get(key, default)
        if not isinstance(found, int | float) or isinstance(found, bool) or not 0 < found < math.inf:
            raise self.refused(key, "a number > 0")
        return float(found)

    def flag(self, key: str, default: bool) -> bool:
        found = self.values.get(key, default)
        if not isinstance(found, bool):
            raise self.refused(key, "true or false")
        return found

    def check_heads(self) -> None:
        """Checks that the model is a language model, and no classifier on the same layers."""
        classes = self.values.get("architectures") or ["ForCausalLM"]
        if not isinstance(classes, list) or not all(
            isinstance(name, str) and name.endswith("ForCausalLM") for name in classes
        ):
            raise self.refused("architectures", "a list of classes whose names end in ForCausalLM")

    def unrotated(self, layers: int) -> frozenset[int]:
        """Returns the layers of a SmolLM3 model without rotary embeddings; their entries in `no_rope_layers` are 0."""
        given = self.values.get("no_rope_layers")
        if given is None:
            interval = self.count("no_rope_layer_interval", 4)
            return frozenset(range(interval - 1, layers, interval))
        if not isinstance(given, list) or len(given) < layers or any(each not in (0, 1) for each in given):
            raise self.refused("no_rope_layers", f"a list of {layers}, each 1, or 0 for no rotary embeddings")
        return frozenset(layer for layer in range(layers) if not given[layer])

    def windows(self, kind: str, layers: int, default: int | None, unrotated: frozenset[int]) -> tuple[int | None, ...]:
        """The window of each layer. transformers' window of n tokens counts the query itself, as ours does."""
        switched = kind in SWITCHED
        has_windows = self.flag("use_sliding_window", False) if switched else default is not None
        width = self.values.get("sliding_window", default) if has_windows else None
        if width is not None:
            self.count("sliding_window", default)
        types = self.values.get("layer_types")
        if types is None and kind == "smollm3":
            return tuple(width if layer in unrotated else None for layer in range(layers))
        if types is None:
            first = self.count("max_window_layers", 28, least=0) if kind in ("qwen3", "qwen2") else 0
            return tuple(width if layer >= first else None for layer in range(layers))
        if not isinstance(types, list) or len(types) != layers or not set(map(str, types)) <= set(WINDOWS):
            raise self.refused("layer_types", f"a list of {layers}, each {' or '.join(WINDOWS)}")
        if width is None and "sliding_attention" in types:
            where = "use_sliding_window=true and " if switched else ""
            accepted = f"full_attention in every layer without {where}a sliding_window"
            raise self.refused("layer_types", accepted)
        windows = tuple(width if WINDOWS[each] else None for each in types)
        if kind == "mistral" and windows != (width,) * layers:  # transformers' Mistral does not read layer_types
            accepted = f"{'full' if width is None else 'sliding'}_attention in every layer, or model_type=ministral"
            raise self.refused("layer_types", accepted)
        return windows

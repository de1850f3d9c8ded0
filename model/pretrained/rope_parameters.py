"""Reads the rotary embeddings of a config.json: `rope_parameters` (transformers 5), or `rope_theta` and `rope_scaling`
(before)."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from model.pretrained.errors import PretrainedError, refused

KINDS = {"default": "none", "linear": "linear", "dynamic": "dynamic", "llama3": "llama3", "yarn": "yarn_hf"}
"""transformers' rope_type -> ModelConfig.rope_scaling."""

DEFAULT_THETA = 10000.0
YARN_ENDS = {"beta_fast": 32.0, "beta_slow": 1.0}

UNSCALED: dict[str, Any] = {
    "rope_scaling": "none",
    "rope_factor": 1.0,
    "rope_beta_fast": YARN_ENDS["beta_fast"],
    "rope_beta_slow": YARN_ENDS["beta_slow"],
    "rope_attention_factor": None,
    "rope_truncate": True,
}
"""The settings of ModelConfig for a model without a scaling."""


def rope_settings(config: Mapping[str, Any], file: Path, max_position: int) -> dict[str, Any]:
    """Returns the fields of ModelConfig that describe the rotary embeddings.

    Args:
        config: the keys of config.json. `file`: its path, for errors.
        max_position: `max_position_embeddings`.

    Raises:
        PretrainedError: the kind of scaling is unknown, or one of its settings is missing or out of range.
    """
    parameters = _parameters(config, file)
    kind = parameters.value("rope_type", parameters.value("type", "default"))
    if not isinstance(kind, str) or kind not in KINDS:
        raise parameters.refused("rope_type", f"one of {', '.join(KINDS)}")
    fraction = parameters.value("partial_rotary_factor", config.get("partial_rotary_factor"))
    if fraction not in (None, 1):
        raise refused(file, "partial_rotary_factor", fraction, "1: every dimension of a head is rotated")
    settings = UNSCALED | {
        "rope_theta": parameters.number("rope_theta", config.get("rope_theta") or DEFAULT_THETA),
        "rope_scaling": KINDS[kind],
        "rope_original_length": max_position,
    }
    if kind in ("llama3", "yarn"):
        original = config.get("original_max_position_embeddings")
        original = parameters.value("original_max_position_embeddings", max_position) if original is None else original
        if not isinstance(original, int) or isinstance(original, bool) or original < 1:
            raise parameters.refused("original_max_position_embeddings", "an integer >= 1")
        settings["rope_original_length"] = original
    if kind == "yarn" and "factor" in parameters.values and parameters.values["factor"] is None:
        settings["rope_factor"] = max_position / settings["rope_original_length"]
    elif kind != "default":
        settings["rope_factor"] = parameters.number("factor")
    if settings["rope_factor"] < 1:
        raise parameters.refused("factor", "at least 1")
    if kind == "llama3":
        settings["rope_beta_fast"] = parameters.number("high_freq_factor")
        settings["rope_beta_slow"] = parameters.number("low_freq_factor")
    if kind == "yarn":
        for key, usual in YARN_ENDS.items():
            settings[f"rope_{key}"] = parameters.number(key, usual)
        settings["rope_attention_factor"] = _attention_factor(parameters, settings["rope_factor"])
        settings["rope_truncate"] = bool(parameters.value("truncate", True))
    return settings


class _Parameters:
    """The settings of rotary embeddings. `name`: of their key in config.json, for errors."""

    def __init__(self, file: Path, name: str, values: Mapping[str, Any]):
        self.file, self.name, self.values = file, name, values

    def refused(self, key: str, accepted: str) -> PretrainedError:
        return refused(self.file, f"{self.name}.{key}", self.values.get(key), accepted)

    def value(self, key: str, default: Any = None) -> Any:
        """The value of a key; `default` if it is missing or null."""
        found = self.values.get(key)
        return default if found is None else found

    def number(self, key: str, default: float | None = None) -> float:
        found = self.value(key, default)
        if not isinstance(found, int | float) or isinstance(found, bool) or not 0 < found < math.inf:
            raise self.refused(key, "a number > 0")
        return float(found)


def _parameters(config: Mapping[str, Any], file: Path) -> _Parameters:
    """The settings, under whichever key the file has them. `rope_scaling` counts first, as in transformers."""
    name = next((key for key in ("rope_scaling", "rope_parameters") if config.get(key)), "rope_parameters")
    values = config.get(name) or {}
    if not isinstance(values, Mapping):
        raise refused(file, name, values, "an object with rope_type, or null")
    types = config.get("layer_types")
    types = types if isinstance(types, list) else []  # config_file.py refuses others
    by_layer = [values[key] for key in ("full_attention", "sliding_attention") if key in types and key in values]
    if by_layer:
        if not isinstance(by_layer[0], Mapping) or any(each != by_layer[0] for each in by_layer):
            raise refused(file, name, values, "an object, the same for every type of layer")
        values = by_layer[0]
    return _Parameters(file, name, values)


def _attention_factor(parameters: _Parameters, factor: float) -> float | None:
    """The factor on cosines and sines; None for 0.1 ln(factor) + 1, which ModelConfig computes."""
    if parameters.value("attention_factor") is not None:
        return parameters.number("attention_factor")
    if not (parameters.value("mscale") and parameters.value("mscale_all_dim")):
        return None
    one, all_dimensions = (0.1 * parameters.number(key) * math.log(factor) + 1 for key in ("mscale", "mscale_all_dim"))
    return one / all_dimensions

"""Reads configs of earlier versions: keys that were renamed, removed or added since a run was saved."""

from collections.abc import Mapping
from typing import Any

ALIASES: dict[str, str | None] = {
    "attention.patterns.*.strategy": None,  # the kernels that it chose between gave the same result
    "model.hidden": "mlp_width",
}
"""Old key -> its new name in the same group, or None if it was removed. `*` stands for any one name."""

ADDED: dict[str, Any] = {
    "phases": None,
    "model.z_loss": 0.0,
    "optimizer.freeze": [],
    "optimizer.indexer_learning_rate": None,
    "model.qk_norm": True,
    "model.qkv_bias": False,
    "model.rope_beta_fast": 32.0,
    "model.rope_beta_slow": 1.0,
    "model.rope_attention_factor": None,
    "model.rope_truncate": True,
    "trainer.context_parallel": 1,
    "trainer.cuda_graph": False,
    "trainer.fp8": False,
    "trainer.rank_timeout": 600,
    "trainer.nodes": 1,
    "trainer.profile": None,
    "data.document_mask": True,
    "data.length_weights": None,
    "data.on_bad_document": "skip",  # files that were not UTF-8 were left out
    "evaluation.by_context.places": 1,
    "evaluation.limit": None,
}
"""Key -> the value under which a run of a version without the key was trained."""


def upgrade(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a saved config under the current names. Where it has both the old and the new key, the new one counts."""
    upgraded = dict(config)
    for key, name in ALIASES.items():
        upgraded = _replace(upgraded, key.split("."), name)
    for key, value in ADDED.items():
        upgraded = _with(upgraded, key.split("."), value)
    return upgraded


def _with(config: Mapping[str, Any], path: list[str], value: object) -> dict[str, Any]:
    """Returns a config that has `value` where it has the group of a key, but not the key."""
    first, *rest = path
    if not rest:
        return {first: value, **config}
    group = config.get(first)
    return {**config, first: _with(group, rest, value)} if isinstance(group, Mapping) else dict(config)


def renamed(key: str) -> str | None:
    """Returns the current name of a dotted key of an earlier version; None if it was not renamed."""
    group, _, _ = key.rpartition(".")
    name = ALIASES.get(key)
    return f"{group}.{name}" if name else None


def _replace(config: dict[str, Any], path: list[str], name: str | None) -> dict[str, Any]:
    first, *rest = path
    if not rest:
        kept = {key: value for key, value in config.items() if key != first}
        return {name: config[first], **kept} if name and first in config else kept
    found = [key for key, value in config.items() if first in ("*", key) and isinstance(value, Mapping)]
    return {**config, **{key: _replace(dict(config[key]), rest, name) for key in found}}

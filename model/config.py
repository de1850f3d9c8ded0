"""The sizes of a model and the plan of its attention; a checkpoint stores both, so that the model can be rebuilt."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kernels.patterns import Pattern

ROPE_SCALINGS = ("none", "linear", "ntk", "dynamic", "llama3", "yarn", "yarn_hf")
"""The scalings of rotary embeddings; model/rope.py describes them."""

ATTENTION_FACTORS = ("yarn", "yarn_hf")
"""The scalings that also multiply cosines and sines by a factor."""

MODEL_ROPE, NO_ROPE = "model", "none"
Rope = str | float
"""The rotary embeddings of a pattern's layers: MODEL_ROPE for those of ModelConfig, NO_ROPE for none (NoPE, Kazemnejad
et al. 2023), or a base of their own, without scaling (as the windows of Gemma 3)."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Sizes of the decoder; configs/model/*.yaml hold the presets, configs/schema.py the types and ranges. Raises
    ValueError, naming the field, for sizes that do not fit each other."""

    width: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp_width: int
    """Width of the hidden layer of the SwiGLU."""
    vocabulary: int
    max_length: int
    """Longest sequence the model accepts."""
    rope_theta: float
    rope_scaling: str
    """One of ROPE_SCALINGS: how to reach `rope_factor` times beyond `rope_original_length`."""
    rope_factor: float
    rope_original_length: int
    rope_beta_fast: float
    rope_beta_slow: float
    """llama3, yarn, yarn_hf: a frequency with more than `rope_beta_fast` turns in the original length stays, and one
    with fewer than `rope_beta_slow` is divided by `rope_factor`."""
    rope_attention_factor: float | None
    """yarn, yarn_hf: the factor on cosines and sines; None is 0.1 ln(rope_factor) + 1."""
    rope_truncate: bool
    """yarn_hf: the two ends of the transition are rounded outwards to whole dimensions."""
    tie_embeddings: bool
    sink_logits: bool
    """Each head has a learned logit in its softmax, which takes weight and adds no value (gpt-oss)."""
    norm_epsilon: float
    qk_norm: bool
    """RMSNorm on each head's queries and keys before the rotation, as in Qwen3; Qwen2, Llama and Mistral have none."""
    qkv_bias: bool
    """Queries, keys and values have a bias, as in Qwen2."""
    activation_checkpointing: bool | str
    """Recompute each layer in the backward pass from its input alone (True), or from its input and the results of its
    attention ("selective")."""
    z_loss: float
    """Weight, in training, of the penalty on the square of the log-sum-exp of a token's logits."""

    def __post_init__(self) -> None:
        self._require(self.heads % self.kv_heads == 0, "kv_heads", f"a divisor of heads ({self.heads})")
        self._require(self.head_dim % 2 == 0, "head_dim", "even (rotary embeddings turn pairs)")
        by_base = self.rope_scaling in ("ntk", "dynamic")
        self._require(not by_base or self.head_dim > 2, "head_dim", f"at least 4 for rope_scaling={self.rope_scaling}")
        self._require(
            self.rope_beta_fast > self.rope_beta_slow, "rope_beta_fast", f"above rope_beta_slow={self.rope_beta_slow}"
        )
        scales = self.rope_attention_factor is None or self.rope_scaling in ATTENTION_FACTORS
        self._require(scales, "rope_attention_factor", f"null with rope_scaling={self.rope_scaling}")

    def _require(self, condition: bool, name: str, accepted: str) -> None:
        if not condition:
            raise ValueError(f"{name}={getattr(self, name)!r}: must be {accepted}")


@dataclass(frozen=True, kw_only=True)
class AttentionPlan:
    """The pattern of each layer (or of each KV head of a layer), and the backend that computes attention.

    `patterns`: name -> pattern. `schedule`: names, repeated over the depth; `[local, local, full]` gives two local
    layers per full layer. An entry that is a list gives one pattern per KV head, each a mask over the tokens.
    `training`: name -> how the parameters of the pattern's family are trained (AttentionCore.training_class).
    `rope`: name -> the rotary embeddings of its layers, MODEL_ROPE for names that it lacks.
    Raises ValueError for an undefined name, for a pattern in a list that is not a mask, and for a list with several
    rotary embeddings.
    """

    patterns: "Mapping[str, Pattern]"
    schedule: Sequence[str | Sequence[str]]
    block: int
    backend: str
    training: Mapping[str, object] = field(default_factory=dict)
    rope: Mapping[str, Rope] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.schedule:
            raise ValueError(f"schedule={list(self.schedule)!r}: must name at least one of {', '.join(self.patterns)}")
        for entry in self.schedule:
            for name in [entry] if isinstance(entry, str) else entry:
                if name not in self.patterns:
                    raise ValueError(f"schedule names {name!r}: must be one of the patterns {', '.join(self.patterns)}")
                if not isinstance(entry, str) and not self.patterns[name].is_mask:
                    raise ValueError(
                        f"schedule entry {list(entry)!r} gives a KV head {name!r}, which serves whole layers: must "
                        f"be patterns that are masks over the tokens, or the entry {name!r} alone"
                    )
            if not isinstance(entry, str) and len({self.rope.get(name, MODEL_ROPE) for name in entry}) > 1:
                ropes = ", ".join(f"rope={self.rope.get(name, MODEL_ROPE)} of {name}" for name in entry)
                raise ValueError(
                    f"schedule entry {list(entry)!r} has {ropes}: must be the same for all KV heads of a layer"
                )

    def entry(self, layer: int) -> str | tuple[str, ...]:
        """The name of the pattern of `layer`, or one name for each of its KV heads."""
        entry = self.schedule[layer % len(self.schedule)]
        return entry if isinstance(entry, str) else tuple(entry)

    def training_settings(self, layer: int) -> object | None:
        """How the parameters of the family of `layer` are trained; None for families without such settings."""
        return self.training.get(self.entry(layer))

    def rope_of(self, layer: int) -> Rope:
        """The rotary embeddings of `layer`."""
        entry = self.entry(layer)
        return self.rope.get(entry if isinstance(entry, str) else entry[0], MODEL_ROPE)

    def pattern(self, layer: int, kv_heads: int) -> "Pattern | tuple[Pattern, ...]":
        """The pattern of `layer`, or one for each of its `kv_heads`."""
        entry = self.entry(layer)
        if isinstance(entry, str):
            return self.patterns[entry]
        if len(entry) != kv_heads:
            raise ValueError(
                f"schedule entry {list(entry)!r} has {len(entry)} patterns: must have one a KV head ({kv_heads})"
            )
        return tuple(self.patterns[name] for name in entry)

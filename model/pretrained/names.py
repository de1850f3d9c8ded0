"""The names of a model's parameters in Hugging Face's Qwen3, Qwen2, Llama and Mistral classes, and here.

Our names are those of Qwen3 without the prefix `model.`, which Hugging Face's classes give to every parameter but the
head's. The others have the same names without `q_norm` and `k_norm`; Qwen2 has biases of queries, keys and values.
"""

import re

PREFIX = "model."
HEAD = "lm_head.weight"

_IN_LAYER = r"input_layernorm|post_attention_layernorm|self_attn\.([qkvo]_proj|[qk]_norm)|mlp\.(gate|up|down)_proj"
_LAYER = r"layers\.(0|[1-9]\d*)"
_SHARED = re.compile(rf"(embed_tokens|norm|{_LAYER}\.({_IN_LAYER}))\.weight|{_LAYER}\.self_attn\.[qkv]_proj\.bias")
"""Our names of the parameters that both sides have; the head is the only other one."""


def to_hugging_face(name: str) -> str | None:
    """Returns Hugging Face's name of one of our parameters (`Transformer.named_parameters`). None if their classes have
    no such parameter: a sink's logits, or a parameter of an attention pattern."""
    if name == HEAD:
        return name
    return f"{PREFIX}{name}" if _SHARED.fullmatch(name) else None


def from_hugging_face(name: str) -> str | None:
    """Returns our name of a parameter of Hugging Face's classes. None if our model has no such parameter."""
    own = name.removeprefix(PREFIX)
    return own if to_hugging_face(own) == name else None

"""Lets transformers load exported models whose patterns none of its classes has, and attend by our kernels.

    import sys
    sys.path.insert(0, "...")  # this repository
    from model.pretrained import attention_interface
    model = AutoModelForCausalLM.from_pretrained(FOLDER, attn_implementation="farsight")

Importing this file registers the model type of such folders and the attention function "farsight". Without it
transformers refuses the folder, and so never computes full attention in its place. All else is Qwen3's: training,
caches that keep every token, `generate`, and batches with padding.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoConfig,
    AutoModelForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from kernels import Axis, BlockLayout, attention, build_layout
from model.pretrained.export import FARSIGHT, PLAN
from model.pretrained.plan_settings import read_plan


class FarsightConfig(Qwen3Config):
    model_type = FARSIGHT


class FarsightForCausalLM(Qwen3ForCausalLM):
    """A Qwen3 model each of whose layers attends by a pattern of this repository.

    Raises:
        ValueError: another `attn_implementation` is chosen, which would ignore the patterns.
    """

    config_class = FarsightConfig

    def __init__(self, config: FarsightConfig) -> None:
        if config._attn_implementation is None:
            config._attn_implementation = FARSIGHT
        super().__init__(config)
        self._check_implementation()
        plan = read_plan(getattr(config, PLAN))
        for index, layer in enumerate(self.model.layers):
            layer.self_attn.pattern = plan.pattern(index, config.num_key_value_heads)
            layer.self_attn.block = plan.block

    def forward(self, *arguments: Any, **named: Any) -> Any:
        self._check_implementation()
        return super().forward(*arguments, **named)

    def _check_implementation(self) -> None:
        chosen = self.config._attn_implementation
        if chosen != FARSIGHT:
            raise ValueError(f"attn_implementation={chosen}: must be {FARSIGHT}, which computes this model's patterns")


def attend(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    position_ids: Tensor | None = None,
    **unused: Any,
) -> tuple[Tensor, None]:
    """The attention function of transformers' AttentionInterface: query `[batch, heads, queries, head_dim]`, key and
    value `[batch, kv_heads, keys, head_dim]` -> `[batch, queries, heads, head_dim]`. Queries are the last of the keys.

    attention_mask: bool `[batch, keys]`, False for padding, or None. position_ids: `[batch, queries]`; without a cache,
    a position that does not follow the one before it begins another document.
    """
    if dropout:
        raise ValueError(f"attention_dropout={dropout}: must be 0 with attn_implementation={FARSIGHT}")
    queries, keys = query.shape[2], key.shape[2]
    documents = attention_mask
    if documents is None and queries == keys and position_ids is not None:
        documents = _documents(position_ids)
    layout = _layout(module, queries, keys, documents, query.device)
    return attention(query, key, value, layout, scale=scaling).transpose(1, 2), None


def _layout(
    module: torch.nn.Module, queries: int, keys: int, documents: Tensor | None, device: torch.device
) -> BlockLayout:
    if documents is None:
        last = Axis.tokens(queries, device=device, offset=keys - queries)
        return build_layout(module.pattern, last, Axis.tokens(keys, device=device), module.block)
    tokens = Axis.tokens(keys, documents.int(), device)
    return build_layout(module.pattern, tokens.take([range(keys - queries, keys)]), tokens, module.block)


def _documents(position: Tensor) -> Tensor | None:
    """Returns the number of each token's document, int64 `[batch, length]`; None if every sequence is one document."""
    starts = position.diff(prepend=position[:, :1] - 1) != 1
    return starts.cumsum(-1) if starts.any() else None


def padding_mask(
    kv_length: int,
    kv_offset: int = 0,
    attention_mask: Tensor | None = None,
    q_length: int | None = None,
    q_offset: int | Tensor = 0,
    cache_position: Tensor | None = None,
    **unused: Any,
) -> Tensor | None:
    """The mask function of transformers' AttentionMaskInterface: bool `[batch, kv_length]`, False for padding, or None
    where there is none.

    Raises:
        ValueError: the cache is longer than its tokens, or a sequence has padding between its tokens.
    """
    end = int(q_offset) + q_length if q_length is not None else int(cache_position[-1]) + 1
    if kv_offset or end != kv_length:
        raise ValueError(
            f"cache of {kv_length} tokens from {kv_offset} on for {end} tokens: must be a DynamicCache, with every "
            f"token and nothing else, for attn_implementation={FARSIGHT}"
        )
    if attention_mask is None or attention_mask.all():
        return None
    mask = attention_mask[:, :kv_length].bool()
    if (mask.int().diff(prepend=torch.zeros_like(mask[:, :1].int())) == 1).sum(-1).max() > 1:
        raise ValueError(
            "attention_mask: must have padding before or behind the tokens of a sequence, not between them"
        )
    return mask


AttentionInterface.register(FARSIGHT, attend)
AttentionMaskInterface.register(FARSIGHT, padding_mask)
AutoConfig.register(FARSIGHT, FarsightConfig)
AutoModelForCausalLM.register(FarsightConfig, FarsightForCausalLM)

"""The attention of a layer: projections, norms, rotation and sinks, which are the same for every pattern.

Shape suffixes: B batch, T length, W width, H heads, K KV heads, D head_dim.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from kernels.patterns import Pattern
from kernels.softmax import add_sinks
from model.attention.base import AttentionCore, AttentionLayout, AttentionOutput, Inputs, Rotation
from model.attention.families import family_of
from model.attention.layer_cache import LayerCache
from model.attention.sequence_shard import SequenceShard
from model.config import ModelConfig
from model.norm import RMSNorm
from model.projection import joined_product
from model.rope import rotate


class Attention(nn.Module):
    """Projects to queries, keys and values, calls the `core` of the pattern's family, adds sinks, and projects back."""

    def __init__(
        self,
        config: ModelConfig,
        pattern: Pattern | Sequence[Pattern],
        backend: str,
        training_settings: object,
    ) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = config.heads, config.kv_heads, config.head_dim
        self.q_proj = nn.Linear(config.width, config.heads * config.head_dim, bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.width, config.kv_heads * config.head_dim, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.width, config.kv_heads * config.head_dim, bias=config.qkv_bias)
        self.o_proj = nn.Linear(config.heads * config.head_dim, config.width, bias=False)
        self.q_norm = RMSNorm(config.head_dim, config.norm_epsilon) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(config.head_dim, config.norm_epsilon) if config.qk_norm else nn.Identity()
        self.sink_logits = nn.Parameter(torch.zeros(config.heads)) if config.sink_logits else None
        # The name of this module in checkpoints is `attend`; all other code calls it `core`.
        self.attend = family_of(pattern).core(pattern, config, backend, training_settings)

    @property
    def core(self) -> AttentionCore:
        """Attention from projected queries, keys and values, as the pattern's family computes it."""
        return self.attend

    def forward(
        self, x_BTW: Tensor, rotation: Rotation, layout: AttentionLayout | LayerCache
    ) -> tuple[Tensor, Tensor | None, dict[str, Tensor]]:
        """The output `[batch, length, width]`, and `auxiliary` and `diagnostics` of AttentionOutput."""
        inputs = Inputs(x_BTW, *self.project(x_BTW, rotation), rotation)
        if isinstance(layout, LayerCache | SequenceShard):
            attended = layout.attend(inputs, self.core)
        else:
            attended = self.core(inputs, layout)
        out_BHTD, lse_BHT, auxiliary, diagnostics = AttentionOutput(*attended)
        if self.sink_logits is not None:
            out_BHTD, _ = add_sinks(out_BHTD, lse_BHT, self.sink_logits)
        return self.o_proj(out_BHTD.transpose(1, 2).flatten(2)), auxiliary, diagnostics or {}

    def project(self, x_BTW: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Returns queries and keys, normalized and rotated, and values, in the shapes of kernels.attention; and the
        keys before the rotation `[batch, length, kv_heads, head_dim]`, or None if the core does not use them."""
        split = (*x_BTW.shape[:2], -1, self.head_dim)
        projections = self.q_proj, self.k_proj, self.v_proj
        if torch.compiler.is_compiling():
            joined = joined_product(x_BTW, *projections).split([each.out_features for each in projections], -1)
        else:
            joined = [projection(x_BTW) for projection in projections]
        q_BTHD, k_BTKD, v_BTKD = (projected.view(split) for projected in joined)
        q_BTHD, unrotated_BTKD = self.q_norm(q_BTHD), self.k_norm(k_BTKD)
        if x_BTW.shape[1] == 1:  # for one token, starting kernels takes most of the time: rotate both at once
            rotated = rotate(torch.cat([q_BTHD, unrotated_BTKD], 2), *rotation)
            q_BTHD, k_BTKD = rotated.split([self.heads, self.kv_heads], 2)
        else:
            q_BTHD, k_BTKD = rotate(q_BTHD, *rotation), rotate(unrotated_BTKD, *rotation)
        kept = unrotated_BTKD if self.core.wants_unrotated_keys else None
        return q_BTHD.transpose(1, 2), k_BTKD.transpose(1, 2), v_BTKD.transpose(1, 2), kept

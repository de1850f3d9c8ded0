"""The interface of a family of patterns: its inputs, its outputs, its layout of a batch, and its attention core.

Shape suffixes: B batch, T length, W width, H heads, K KV heads, D head_dim.
"""

from collections.abc import Hashable, Sequence
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from kernels import Axis
from kernels.layout.cost import AttentionCost, DecodeCost, decode_cost
from kernels.patterns import Pattern
from model.config import ModelConfig

Rotation = tuple[Tensor, Tensor]
"""Cosines and sines of every token's rotation, float32 `[batch or 1, length, 1, head_dim / 2]` (model/rope.py)."""


class AttentionLayout(Protocol):
    """What a layer's attention needs of a batch: which keys its queries see. It is built once a batch and shared by the
    layers of one pattern; the forward pass does not change it. That of a mask over the tokens is a BlockLayout."""

    @property
    def batch(self) -> int:
        """Number of sequences; 1 if all sequences share the layout."""

    @property
    def queries(self) -> int: ...

    @property
    def overflow(self) -> Tensor | None:
        """As BlockLayout.overflow, for all tile layouts that it consists of."""

    def cost(self, batch: int, heads: int, head_dim: int) -> AttentionCost:
        """As BlockLayout.cost, with densities relative to causal attention over the *tokens*."""


class DrawableLayout(AttentionLayout, Protocol):
    """A layout of whole sequences, for tables and pictures of patterns."""

    def parts(self) -> dict[str, int]:
        """Visible pairs of one head for each kind of keys: "tokens", "summaries of 16", ..."""

    def token_masks(self) -> list[tuple[Tensor, float]]:
        """Masks to draw for the first sequence: booleans `[queries, tokens]`, and the darkness (0 to 1) of each."""


class Inputs(NamedTuple):
    """The inputs of an attention core, with the shapes of kernels.attention except for `x_BTW` and unrotated keys."""

    x_BTW: Tensor
    """The layer's normalized input."""
    q_BHTD: Tensor
    k_BKTD: Tensor
    v_BKTD: Tensor
    unrotated_k_BTKD: Tensor | None
    """Keys before the rotation; None unless `AttentionCore.wants_unrotated_keys`."""
    rotation: Rotation


class AttentionOutput(NamedTuple):
    """The outputs of an attention core. A family without an auxiliary loss may return (out, lse) alone."""

    out_BHTD: Tensor
    lse_BHT: Tensor | None
    """Log-sum-exp of the softmax without sinks; may be None if `AttentionCore.wants_lse` is false."""
    auxiliary: Tensor | None = None
    """An additional training loss, such as a router's: weighted, in nats, summed over queries."""
    diagnostics: dict[str, Tensor] | None = None
    """Scalars to log, on the device."""


class AttentionCore(nn.Module):
    """Attention from projected queries, keys and values to (out, lse). Each family of patterns has a subclass, which
    holds the parameters of that family alone."""

    training_class: ClassVar[type | None] = None
    """The dataclass of `training_settings`, if the family has any. A config gives them beside the pattern's."""
    wants_unrotated_keys = False
    indexer_alone = 0
    """Number of optimizer steps, from the first on, in which only the indexer trains, and the layer attends densely."""
    collects_diagnostics = False
    """Whether to compute the diagnostics that are too expensive for every training step."""

    def __init__(
        self,
        pattern: Pattern | Sequence[Pattern],
        config: ModelConfig,
        backend: str,
        training_settings: Any = None,
    ) -> None:
        """`training_settings`: how the family's own parameters are trained, an instance of `training_class`."""
        super().__init__()
        self.pattern, self.backend, self.training_settings = pattern, backend, training_settings
        self.heads, self.kv_heads, self.head_dim = config.heads, config.kv_heads, config.head_dim
        self.wants_lse = config.sink_logits

    @property
    def layout_pattern(self) -> Pattern | Sequence[Pattern]:
        """The pattern whose layout `forward` takes now; the core's own, unless a warm-up attends to more."""
        return self.pattern

    @classmethod
    def build_layout(
        cls, pattern: Pattern | Sequence[Pattern], tokens: Axis, block: int, fixed: bool = False
    ) -> DrawableLayout:
        """Builds the layout that `forward` needs. `fixed`: its tensors have sizes that depend on shapes alone."""
        raise NotImplementedError

    def cost(self, layout: AttentionLayout, batch: int) -> AttentionCost:
        """Counts the cost of attention of `batch` sequences under `layout`."""
        return layout.cost(batch, self.heads, self.head_dim)

    def decode_cost(self, context: int) -> DecodeCost:
        """The keys that a cache stores for `context` tokens, and those that the next query reads."""
        return decode_cost(self.pattern, context, self.heads // self.kv_heads)

    def decode_bytes(self, context: int, key_bytes: int, router_bytes: int) -> tuple[int, int]:
        """The (stored, read) bytes of the cache of one sequence. `key_bytes`, `router_bytes`: bytes of one element of a
        key or value, and of a router's key."""
        cost, both = self.decode_cost(context), 2 * self.kv_heads * self.head_dim * key_bytes
        return both * cost.stored, both * cost.read

    def set_step(self, step: int) -> None:
        """Sets the number of optimizer steps done, for a core that has a schedule of its own."""

    @property
    def stage(self) -> Hashable:
        """A value that changes when `set_step` changes what this core computes; None for a core without a schedule."""
        return None

    def forward(self, inputs: Inputs, layout: AttentionLayout) -> tuple[Tensor, Tensor] | AttentionOutput:
        """Returns out `[batch, heads, length, head_dim]` and lse `[batch, heads, length]` of one softmax without sinks,
        and a family's auxiliary loss and diagnostics."""
        raise NotImplementedError


def unused(module: nn.Module) -> Tensor | None:
    """Returns a loss of 0 that depends on every parameter of `module`; None if it has no parameters. It is added if a
    batch uses none of them, because data-parallel training waits for the gradient of every parameter."""
    parameters = [parameter.sum() for parameter in module.parameters()]
    return 0 * torch.stack(parameters).sum() if parameters else None

"""What the families of patterns share: what they are given, what they give back, and what they need of a batch.

Shape suffixes: B batch, T length, W width, H heads, K KV heads, D head_dim.
"""

from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from kernels import Axis
from kernels.layout.cost import AttentionCost, DecodeCost, decode_cost
from kernels.patterns import Pattern
from model.config import ModelConfig

Rotation = tuple[Tensor, Tensor]
"""cos, sin: float32 `[batch or 1, length, 1, head_dim / 2]`, of every token (model/rope.py)."""


class AttentionLayout(Protocol):
    """What a layer's attention needs of a batch: which keys its queries see. It is built once a batch and shared by the
    layers of one pattern; the forward pass does not change it. That of a mask over the tokens is a BlockLayout."""

    @property
    def batch(self) -> int:
        """1 where all sequences share the layout."""

    @property
    def queries(self) -> int: ...

    @property
    def overflow(self) -> Tensor | None:
        """As BlockLayout.overflow, of all the layouts that it is made of."""

    def cost(self, batch: int, heads: int, head_dim: int) -> AttentionCost:
        """As BlockLayout.cost, with densities relative to causal attention over the *tokens*."""


class DrawableLayout(AttentionLayout, Protocol):
    """A layout of whole sequences, for tables and pictures of patterns."""

    def parts(self) -> dict[str, int]:
        """Visible pairs, of one head, of each kind of keys: "tokens", "summaries of 16", ..."""

    def token_masks(self) -> list[tuple[Tensor, float]]:
        """For pictures, of the first sequence: booleans `[queries, tokens]`, and how dark (0 to 1) to paint each."""


class Inputs(NamedTuple):
    """What a layer gives its attention. All but `x` as kernels.attention takes it."""

    x_BTW: Tensor
    """The layer's normalized input."""
    q_BHTD: Tensor
    k_BKTD: Tensor
    v_BKTD: Tensor
    unrotated_k_BTKD: Tensor | None
    """Keys before the rotation, where `AttentionCore.wants_unrotated_keys`."""
    rotation: Rotation


class AttentionOutput(NamedTuple):
    """What attention gives back; a family without a loss of its own may return (out, lse) alone."""

    out_BHTD: Tensor
    lse_BHT: Tensor | None
    """Of one softmax without sinks; may be None where `AttentionCore.wants_lse` is false."""
    auxiliary: Tensor | None = None
    """A loss of the family's own to train by (a router's), weighted: nats, summed over queries."""
    diagnostics: dict[str, Tensor] | None = None
    """Scalars to log, on the device."""


class AttentionCore(nn.Module):
    """What differs by pattern: attention from the projections to (out, lse). Its parameters are the pattern's own."""

    training_class: ClassVar[type | None] = None
    """The dataclass of `training_settings`, if the family has any. A config gives them beside the pattern's."""
    wants_unrotated_keys = False
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

    @classmethod
    def build_layout(
        cls, pattern: Pattern | Sequence[Pattern], tokens: Axis, block: int, fixed: bool = False
    ) -> DrawableLayout:
        """What `forward` needs of a batch of these tokens; `fixed`: in sizes that follow from shapes alone."""
        raise NotImplementedError

    def cost(self, layout: AttentionLayout, batch: int) -> AttentionCost:
        """The cost of attention of `batch` sequences under `layout`."""
        return layout.cost(batch, self.heads, self.head_dim)

    def decode_cost(self, context: int) -> DecodeCost:
        """Keys that a cache stores of `context` tokens, and that the next query reads."""
        return decode_cost(self.pattern, context, self.heads // self.kv_heads)

    def decode_bytes(self, context: int, key_bytes: int, router_bytes: int) -> tuple[int, int]:
        """(stored, read) bytes of one sequence's cache. `key_bytes`, `router_bytes`: bytes of one number of a key or
        value, and of a router's key."""
        cost, both = self.decode_cost(context), 2 * self.kv_heads * self.head_dim * key_bytes
        return both * cost.stored, both * cost.read

    def set_step(self, step: int) -> None:
        """Sets the number of optimizer steps done, for a core that has a schedule of its own."""

    def forward(self, inputs: Inputs, layout: AttentionLayout) -> tuple[Tensor, Tensor] | AttentionOutput:
        """out `[batch, heads, length, head_dim]` and lse `[batch, heads, length]`, of one softmax without sinks; and
        perhaps a loss."""
        raise NotImplementedError


def unused(module: nn.Module) -> Tensor | None:
    """0, differentiable in every parameter of `module`, None without any: a loss to add where a batch had no use for
    them. Data-parallel training waits for the gradient of every parameter."""
    parameters = [parameter.sum() for parameter in module.parameters()]
    return 0 * torch.stack(parameters).sum() if parameters else None

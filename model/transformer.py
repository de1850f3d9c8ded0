"""The decoder: pre-norm blocks of attention and SwiGLU, whose attention sees what each layer's layout marks as visible.

Attribute names and shapes are those of the Qwen3 family, so that weights can be carried over both ways.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.nn import functional as F
from torch.utils.checkpoint import (
    CheckpointPolicy,
    SelectiveCheckpointContext,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from kernels import Axis, fp8
from kernels.dispatch import load_backends
from kernels.layout.block_layout import any_overflow
from kernels.layout.cost import TRAINING_FLOPS, AttentionCost
from kernels.patterns import Pattern
from kernels.swiglu import swiglu
from model.attention import (
    Attention,
    AttentionCore,
    AttentionLayout,
    LayerCache,
    Rotation,
    SequenceShard,
    build_layouts,
    share_sequences,
)
from model.config import AttentionPlan, ModelConfig
from model.loss import linear_cross_entropy
from model.norm import RMSNorm
from model.parallel.context import Context
from model.precision import FP8
from model.projection import joined_product
from model.rope import RotaryEmbedding

KEPT = (
    torch.ops.farsight.attention.default,
    torch.ops.farsight.selected_attention.default,
    torch.ops.farsight.select.default,
    torch.ops.farsight.indexer_loss.default,
    torch.ops.farsight.dense_indexer_loss.default,
)
"""The operators whose results selective checkpointing keeps: they cost most for the bytes that they return."""


@dataclass(frozen=True)
class LossOutput:
    """The next-token loss of a batch, in nats.

    total: sum over all scored tokens, differentiable; in training it includes the z-loss. per_token: `[batch, length]`,
    detached. count: number of scored tokens. auxiliary: the weighted loss of routers, summed over queries and layers,
    differentiable. Training adds it to `total`; it is no part of the model's quality. None without a router's loss.
    """

    total: Tensor
    per_token: Tensor
    count: Tensor
    auxiliary: Tensor | None = None


@dataclass(frozen=True)
class ModelCost:
    """The cost of one forward and backward pass over a batch, in training FLOPs without recomputation. The head counts
    for every token, also where the loss computes the logits of scored tokens alone."""

    attention: AttentionCost
    flops: int
    dense_flops: int
    """FLOPs of the same batch under dense causal attention."""


class FeedForward(nn.Module):
    """SwiGLU (Shazeer 2020)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.width, config.mlp_width, bias=False)
        self.up_proj = nn.Linear(config.width, config.mlp_width, bias=False)
        self.down_proj = nn.Linear(config.mlp_width, config.width, bias=False)
        self.trains_in_fp8 = False

    def forward(self, x: Tensor) -> Tensor:
        if self.trains_in_fp8 and self.training:
            joined = fp8.linear(x, self.gate_proj.weight, self.up_proj.weight)
            return fp8.linear(swiglu(joined), self.down_proj.weight)
        if torch.compiler.is_compiling():
            return self.down_proj(swiglu(joined_product(x, self.gate_proj, self.up_proj)))
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class LayerOutput(NamedTuple):
    """x: the residual stream after a layer, `[batch, length, width]`. auxiliary, diagnostics: as in AttentionOutput."""

    x: Tensor
    auxiliary: Tensor | None
    diagnostics: dict[str, Tensor]


def _keeps(
    context: SelectiveCheckpointContext, operator: OpOverload, *arguments: Any, **named: Any
) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operator in KEPT else CheckpointPolicy.PREFER_RECOMPUTE


keep_attention = partial(create_selective_checkpoint_contexts, _keeps)


class Layer(nn.Module):
    """A pre-norm block: attention and SwiGLU, each of which adds to the residual stream."""

    def __init__(
        self, config: ModelConfig, pattern: Pattern | Sequence[Pattern], backend: str, training_settings: object
    ) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.width, config.norm_epsilon)
        self.self_attn = Attention(config, pattern, backend, training_settings)
        self.post_attention_layernorm = RMSNorm(config.width, config.norm_epsilon)
        self.mlp = FeedForward(config)
        self.checkpointing = config.activation_checkpointing

    def compile_in_training(self) -> None:
        """Compiles `forward` for training mode. Only `forward` is replaced, so that the module's hooks stay outside of
        the graph."""
        eager, compiled = self.forward, torch.compile(self.forward, fullgraph=True, dynamic=False)
        self.forward = lambda *arguments: (compiled if self.training else eager)(*arguments)

    def forward(self, x: Tensor, rotation: Rotation, layout: AttentionLayout | LayerCache) -> LayerOutput:
        if self.checkpointing and self.training:
            keeps = {"context_fn": keep_attention} if self.checkpointing == "selective" else {}
            return checkpoint(self.compute, x, rotation, layout, use_reentrant=False, **keeps)
        return self.compute(x, rotation, layout)

    def compute(self, x: Tensor, rotation: Rotation, layout: AttentionLayout | LayerCache) -> LayerOutput:
        """As `forward`, without activation checkpointing."""
        attended, auxiliary, diagnostics = self.self_attn(self.input_layernorm(x), rotation, layout)
        h = x + attended
        return LayerOutput(h + self.mlp(self.post_attention_layernorm(h)), auxiliary, diagnostics)


class Transformer(nn.Module):
    """A decoder-only language model whose layers attend by `plan`."""

    def __init__(self, config: ModelConfig, plan: AttentionPlan) -> None:
        super().__init__()
        self.config, self.plan = config, plan
        self.embed_tokens = nn.Embedding(config.vocabulary, config.width)
        self.patterns = [plan.pattern(layer, config.kv_heads) for layer in range(config.layers)]
        self.layers = nn.ModuleList(
            Layer(config, pattern, plan.backend, plan.training_settings(layer))
            for layer, pattern in enumerate(self.patterns)
        )
        self.norm = RMSNorm(config.width, config.norm_epsilon)
        self.lm_head = nn.Linear(config.width, config.vocabulary, bias=False)
        ropes = [plan.rope_of(layer) for layer in range(config.layers)]
        different = {rope: RotaryEmbedding(config, rope) for rope in dict.fromkeys(ropes)}
        self.rotaries = nn.ModuleList(different[rope] for rope in ropes)
        """The rotary embeddings of each layer; those with the same settings are one module."""
        self.compiled = self.head_trains_in_fp8 = False
        self.layer_diagnostics: list[dict[str, Tensor]] = []  # of each layer, in the latest call
        self.initialize()
        if config.tie_embeddings:
            self.lm_head.weight = self.embed_tokens.weight

    @torch.no_grad()
    def initialize(self) -> None:
        """Initializes as GPT-2: N(0, 0.02), and matrices that write to the residual stream divided by sqrt(2 * layers).
        Biases are zero.

        Wide matrices get N(0, 1 / sqrt(width)) if that is smaller, so that the variance depends on neither depth nor
        width.
        """
        std = min(0.02, self.config.width**-0.5)
        for name, parameter in self.named_parameters():
            if name.endswith("proj.bias"):
                nn.init.zeros_(parameter)
            elif parameter.dim() == 2 and not parameter.is_meta:
                residual = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(parameter, std=std / (2 * self.config.layers) ** 0.5 if residual else std)

    def set_plan(self, plan: AttentionPlan) -> None:
        """Attends by `plan` from now on. Its patterns must be of the same families, and need the same parameters."""
        self.plan = plan
        self.patterns = [plan.pattern(layer, self.config.kv_heads) for layer in range(self.config.layers)]
        for core, pattern in zip(self.cores, self.patterns, strict=True):
            core.pattern = pattern

    def build_layouts(
        self, document: Tensor | None, length: int, context: Context | None = None
    ) -> list[AttentionLayout]:
        """Each layer's layout of a batch: document int `[batch, length]`, or None if every sequence is one document.
        With a `context`, whose ranks share the sequences, layouts are of this rank's tokens, and `document` is of all.

        Layers with the same pattern share one layout (a BlockLayout, if the pattern is a mask over the tokens); without
        documents, layouts are cached. When training on a GPU or with compiled layers, layouts have fixed sizes, so that
        no step waits for the device and no layer is compiled again: see `overflow`.
        """
        fixed = self.training and (self.embed_tokens.weight.is_cuda or self.compiled)
        tokens = Axis.tokens(length, document, device=self.embed_tokens.weight.device)
        return build_layouts([core.layout_pattern for core in self.cores], tokens, self.plan.block, fixed, context)

    def share_sequences(self, group: dist.ProcessGroup, length: int) -> Context:
        """Returns how the ranks of `group` share sequences of `length` tokens. ValueError: the length does not
        divide."""
        return share_sequences(self.patterns, self.plan.block, group, length)

    def bytes_sent(self, shards: Sequence[SequenceShard], batch: int, key_bytes: int) -> list[tuple[int, int]]:
        """Returns, for each layer, the bytes that this rank sends to others, (forward pass, backward pass), over
        `batch` sequences. `key_bytes`: bytes of one element of a key or value. Recomputation sends those of the forward
        pass again."""
        sent = [shard.bytes_sent(core, key_bytes) for shard, core in zip(shards, self.cores, strict=True)]
        return [(forward * batch, backward * batch) for forward, backward in sent]

    @staticmethod
    def overflow(layouts: Sequence[AttentionLayout]) -> Tensor | None:
        """Whether a layout of fixed sizes was too small for its tiles, bool `[]` on the device; None: none is fixed."""
        return any_overflow(list(dict.fromkeys(layouts)))

    def forward(self, tokens: Tensor, position: Tensor, layouts: Sequence[AttentionLayout | LayerCache]) -> Tensor:
        """tokens and position `[batch, length]` -> final hidden states `[batch, length, width]`."""
        return self._run(tokens, position, layouts)[0]

    def _run(
        self, tokens: Tensor, position: Tensor, layouts: Sequence[AttentionLayout | LayerCache]
    ) -> tuple[Tensor, list[Tensor]]:
        """Returns the final hidden states, and the auxiliary losses of the layers."""
        x = self.embed_tokens(tokens)
        if x.is_cuda and torch.is_autocast_enabled("cuda") and torch.get_autocast_dtype("cuda") == torch.bfloat16:
            x = x.bfloat16()  # the residual stream, as in a model whose weights are bf16; sums and norms are in float32
        rotations = {rotary: rotary(position) for rotary in dict.fromkeys(self.rotaries)}
        losses, self.layer_diagnostics = [], []
        for layer, rotary, layout in zip(self.layers, self.rotaries, layouts, strict=True):
            x, auxiliary, diagnostics = layer(x, rotations[rotary], layout)
            self.layer_diagnostics.append(diagnostics)
            if auxiliary is not None:
                losses.append(auxiliary)
        return self.norm(x), losses

    def compile_layers(self, phases: int = 1) -> None:
        """Compiles the training step's pass through each layer as one graph, in which attention is one operator.

        Layers of equal patterns share one graph, as do batches of one shape, whatever their documents: their layouts
        have fixed sizes. Evaluation and decoding, whose shapes vary, stay as they are.

        phases: number of phases of the training. Each has its own shapes and windows, and so a graph for each kind of
            layer.
        """
        self.compiled = True
        graphs = len({*zip(self.patterns, self.rotaries, strict=True)}) * (phases + 1)  # + 1: an indexer's warm-up ends
        limits = torch._dynamo.config
        limits.recompile_limit = max(limits.recompile_limit, graphs)  # one graph more is an error
        limits.accumulated_recompile_limit = max(limits.accumulated_recompile_limit, graphs)
        load_backends()
        for layer in self.layers:
            layer.compile_in_training()

    def train_in_fp8(self, products: str | bool) -> None:
        """Sets which matrix products of a training step are computed in 8 bits: "mlp" for those of SwiGLU,
        "mlp_and_head" for the logits, too, False for none. Parameters, evaluation and decoding do not change."""
        for layer in self.layers:
            layer.mlp.trains_in_fp8 = products in FP8
        self.head_trains_in_fp8 = products == "mlp_and_head"

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden `[..., width]` -> `[..., vocabulary]`."""
        return self.lm_head(hidden)

    def loss(
        self,
        tokens: Tensor,
        targets: Tensor,
        position: Tensor,
        layouts: Sequence[AttentionLayout],
        scored: int | None = None,
    ) -> LossOutput:
        """Returns the next-token loss. tokens, targets and position: int64 `[batch, length]`; targets of -100 are not
        scored. layouts: one for each layer (`build_layouts`). scored: as in `linear_cross_entropy`."""
        hidden, losses = self._run(tokens, position, layouts)
        penalty = self.config.z_loss if self.training else 0.0
        in_fp8 = self.head_trains_in_fp8 and self.training
        total, per_token = linear_cross_entropy(
            hidden.flatten(0, 1), self.lm_head.weight, targets.flatten(), penalty, in_fp8, scored
        )
        auxiliary = sum(losses) if losses else None
        return LossOutput(total, per_token.view(targets.shape), (targets >= 0).sum(), auxiliary)

    @property
    def cores(self) -> list[AttentionCore]:
        """The attention core of each layer."""
        return [layer.self_attn.core for layer in self.layers]

    @property
    def indexers_alone(self) -> int:
        """Number of optimizer steps, from the first on, in which only indexers train; 0 without such a warm-up."""
        return max(core.indexer_alone for core in self.cores)

    def set_step(self, step: int) -> None:
        """Sets the number of optimizer steps done, for cores with a schedule of their own (an indexer's warm-up)."""
        for core in self.cores:
            core.set_step(step)

    @property
    def stage(self) -> Hashable:
        """A value that changes when the model computes something else of the same batch and parameters: with another
        plan, or at another stage of a core."""
        return self.plan, tuple(core.stage for core in self.cores)

    def collect_diagnostics(self, collect: bool) -> None:
        """Sets whether layers also compute diagnostics that are too expensive for every step, such as a router's
        recall."""
        for core in self.cores:
            core.collects_diagnostics = collect

    def diagnostics(self) -> dict[str, Tensor]:
        """Returns the mean of each diagnostic over the layers that reported it in their latest call; on the device."""
        names = dict.fromkeys(name for layer in self.layer_diagnostics for name in layer)
        found = {name: [layer[name] for layer in self.layer_diagnostics if name in layer] for name in names}
        return {name: torch.stack(values).mean() for name, values in found.items()}

    def cost(self, layouts: Sequence[AttentionLayout], batch: int = 1) -> ModelCost:
        """Counts the cost of training on a batch with these layouts. `batch`: the number of sequences, if they share
        the layouts (whose batch is 1 then)."""
        batch = max(batch, max(layout.batch for layout in layouts))
        once = {id(layout): core.cost(layout, batch) for layout, core in zip(layouts, self.cores, strict=True)}
        total = sum((once[id(layout)] for layout in layouts), AttentionCost(0, 0, 0, 0))
        tokens = batch * layouts[0].queries
        matrices = sum(p.numel() for name, p in self.named_parameters() if p.dim() == 2 and "embed_tokens" not in name)
        if self.config.tie_embeddings:
            matrices += self.embed_tokens.weight.numel()
        dense = TRAINING_FLOPS * self.config.head_dim * total.causal_pairs
        return ModelCost(total, 6 * matrices * tokens + total.flops, 6 * matrices * tokens + dense)

    def parameter_count(self) -> int:
        """Number of parameters; a tied matrix counts once."""
        return sum(p.numel() for p in self.parameters())

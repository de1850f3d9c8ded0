"""Routed attention: one call for the window and one for the chosen blocks, merged into one softmax."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kernels import Axis, BlockLayout, Selection, attention, block_mass, block_means, build_layout, merge, select
from kernels.layout.cost import TRAINING_FLOPS, AttentionCost, causal_pairs
from kernels.patterns import Routed
from kernels.selection.indexer_loss import dense_indexer_loss, indexer_loss
from kernels.selection.routing import eligible_range
from kernels.selection.routing_health import block_use, recall, union_of_neighbours
from model.attention.base import AttentionCore, AttentionOutput, Inputs, unused
from model.attention.routed.indexer import Indexer, IndexerTraining
from model.config import ModelConfig

RECALL_QUERIES = 64
"""Number of queries per sequence on which the recall of a router is measured."""

Branch = tuple[Tensor, Tensor]
"""(out, lse) of attention to some of the keys."""
Routing = tuple[Selection, Tensor, Tensor]
"""The chosen blocks, and the router's queries and summaries by which they were chosen."""


@dataclass(frozen=True, eq=False)
class RoutedLayout:
    """The layout of routed attention: that of the window, and the beginnings of documents. Blocks are chosen later."""

    pattern: Routed
    window: BlockLayout
    document_start: Tensor
    """int32 `[batch, queries]`: the sequence index of the first token of each query's document."""
    query: Tensor | None = None
    """int32 `[queries]`: the sequence indices of the queries, if they are only some of the tokens. None: 0, 1, ..."""
    keys: int | None = None
    """Tokens of the sequence; None: as many as there are queries."""

    @property
    def batch(self) -> int:
        return self.document_start.shape[0]

    @property
    def queries(self) -> int:
        return self.document_start.shape[1]

    @property
    def overflow(self) -> Tensor | None:
        return self.window.overflow

    def cost(self, batch: int, heads: int, head_dim: int, selectors: int | None = None) -> AttentionCost:
        """Counts the pairs of the window and of the chosen blocks, and the FLOPs of scoring every past block (T² /
        block: small, but not linear in T).

        A chosen block counts in full, even if a document begins in it. `selectors`: choices per query; None: one per
        head. The loss of an indexer is not counted.
        """
        pattern = self.pattern
        window = self.window.cost(batch, heads, head_dim)
        eligible, repeat = self._eligible(), batch // self.batch
        chosen = self._chosen_pairs() * heads * repeat
        scored = int(eligible.sum()) * (selectors or heads) * repeat
        dim = pattern.indexer_dim if pattern.router == "indexer" else head_dim
        flops = TRAINING_FLOPS * head_dim * chosen + 2 * dim * scored
        causal = causal_pairs(self.queries, self.queries) * batch * heads
        return AttentionCost(window.visible_pairs + chosen, window.tile_pairs + chosen, causal, window.flops + flops)

    def parts(self) -> dict[str, int]:
        """Visible pairs of one head in the window and in chosen blocks, and the number of scores of the router."""
        scored = int(self._eligible().sum())
        return {"window": int(self.window.pairs.sum()), "chosen blocks": self._chosen_pairs(), "router scores": scored}

    def token_masks(self) -> list[tuple[Tensor, float]]:
        """The window and, lighter, the blocks that may be chosen, for the first sequence."""
        lowest, limit = eligible_range(self.document_start[:1], self.pattern.window, self.pattern.block)
        block = torch.arange(self.queries, device=lowest.device) // self.pattern.block
        may_be_chosen = (block >= lowest[0, :, None]) & (block < limit[0, :, None])
        same_document = torch.arange(self.queries, device=lowest.device) >= self.document_start[0, :, None]
        return [(self.window.dense_mask()[0, 0], 1.0), (may_be_chosen & same_document, 0.25)]

    def _eligible(self) -> Tensor:
        """Number of blocks that each query may choose from, int64 `[batch, length]`."""
        lowest, limit = eligible_range(self.document_start, self.pattern.window, self.pattern.block, self.query)
        return (limit - lowest).clamp(min=0).long()

    def _chosen_pairs(self) -> int:
        return int(self._eligible().clamp(max=self.pattern.slots).sum()) * self.pattern.block


class RoutedAttention(AttentionCore):
    training_class = IndexerTraining

    def __init__(
        self, pattern: Routed, config: ModelConfig, backend: str, training_settings: IndexerTraining | None = None
    ) -> None:
        super().__init__(pattern, config, backend, training_settings)
        self.selectors = config.kv_heads if pattern.share == "group" else config.heads
        self.max_length = config.max_length
        self.indexer = None
        if pattern.router == "indexer":
            if training_settings is None:
                raise ValueError(f"router={pattern.router!r}: must come with IndexerTraining (AttentionPlan.training)")
            self.indexer = Indexer(pattern, config, training_settings)
            if training_settings.indexer_warmup_alone:
                self.indexer_alone = training_settings.indexer_warmup
        self.set_step(0)

    def set_step(self, step: int) -> None:
        # Not the step itself: a compiled layer would be compiled anew at every step.
        self.warming_up = self.indexer is not None and step < self.training_settings.indexer_warmup

    @property
    def stage(self) -> bool:
        return self.warming_up

    @property
    def attends_densely(self) -> bool:
        """Whether the layer sees every past token, as in training while its indexer trains alone."""
        return self.training and self.warming_up and self.indexer_alone > 0

    @property
    def layout_pattern(self) -> Routed:
        pattern = self.pattern
        assert isinstance(pattern, Routed)
        return replace(pattern, window=self.max_length) if self.attends_densely else pattern

    @classmethod
    def build_layout(cls, pattern: Routed, tokens: Axis, block: int, fixed: bool = False) -> RoutedLayout:
        return RoutedLayout(pattern, build_layout(pattern.local, tokens, block=block, fixed=fixed), tokens.origin)

    def cost(self, layout: RoutedLayout, batch: int) -> AttentionCost:
        return layout.cost(batch, self.heads, self.head_dim, self.selectors)

    def decode_bytes(self, context: int, key_bytes: int, router_bytes: int) -> tuple[int, int]:
        stored, read = super().decode_bytes(context, key_bytes, router_bytes)
        cost, pattern = self.decode_cost(context), self.pattern
        size = self.kv_heads * self.head_dim if pattern.router == "mean_key" else pattern.indexer_dim
        return stored + router_bytes * size * cost.router_stored, read + router_bytes * size * cost.router_read

    def forward(self, inputs: Inputs, layout: RoutedLayout, summaries: Tensor | None = None) -> AttentionOutput:
        """summaries: those of `block_summaries`, for all key blocks; None: they are computed from the inputs."""
        if self.attends_densely:  # the window of the layout is the whole past
            tensors = (inputs.q_BHTD, inputs.k_BKTD, inputs.v_BKTD)
            out, lse = attention(*tensors, layout.window, return_lse=True, backend=self.backend)
            return AttentionOutput(out, lse, *self.finish(inputs, lse, *self.choose(inputs, layout, summaries)))
        window, routed, routing = self.window_and_routed(inputs, layout, summaries)
        out, lse = merge([window, routed])
        return AttentionOutput(out, lse, *self.finish(inputs, lse, *routing))

    def window_and_routed(
        self, inputs: Inputs, layout: RoutedLayout, summaries: Tensor | None
    ) -> tuple[Branch, Branch, Routing]:
        """Attention to the window, attention to the chosen blocks, and the routing."""
        tensors = (inputs.q_BHTD, inputs.k_BKTD, inputs.v_BKTD)
        routing = self.choose(inputs, layout, summaries)
        window = attention(*tensors, layout.window, return_lse=True, backend=self.backend)
        routed = attention(*tensors, routing[0], return_lse=True, backend=self.backend)
        return window, routed, routing

    def choose(self, inputs: Inputs, layout: RoutedLayout, summaries: Tensor | None = None) -> Routing:
        """Returns the selection, and the router's queries and summaries `[batch, selectors, ...]` from which it
        follows."""
        pattern = self.pattern
        document_start = layout.document_start.expand(len(inputs.q_BHTD), -1)
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.indexer is not None):
            queries = self.router_queries(inputs)
            if summaries is None:
                summaries = self.block_summaries(inputs, document_start)
            if summaries.shape[1] == 1:  # an indexer's keys serve all selectors
                summaries = summaries.expand(-1, self.selectors, -1, -1)
            else:
                summaries = summaries.repeat_interleave(self.selectors // summaries.shape[1], 1)
        selection = select(
            queries,
            summaries,
            document_start,
            top_k=min(pattern.top_k, max(1, summaries.shape[2])),  # more than there are blocks would waste memory
            window=pattern.window,
            block=pattern.block,
            first_block=pattern.first_block,
            backend="blocked" if self.backend in ("blocked", "reference") else "auto",
            query=layout.query,
            keys=layout.keys,
        )
        return selection, queries, summaries

    def block_summaries(self, inputs: Inputs, document_start: Tensor) -> Tensor:
        """Returns the router's key of each block, `[batch, kv_heads or 1, blocks, dim]`. document_start: int32 `[batch,
        length]`, counted from the first token of `inputs`."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.indexer is not None):
            return block_means(self.router_keys(inputs), document_start, self.pattern.block)

    def router_queries(self, inputs: Inputs) -> Tensor:
        """Queries by which the router scores blocks: `[batch, selectors, length, dim]`."""
        if self.indexer is not None:
            return self.indexer.queries(inputs.x_BTW)
        queries = inputs.q_BHTD.unflatten(1, (self.selectors, -1))
        # A group's score is the mean of its heads' scores, which is the score of its mean query.
        return queries.float().mean(2).to(queries.dtype) if queries.shape[2] > 1 else queries[:, :, 0]

    def router_keys(self, inputs: Inputs) -> Tensor:
        """Keys whose means are the summaries of the blocks: `[batch, kv_heads or 1, length, dim]`."""
        return inputs.k_BKTD if self.indexer is None else self.indexer.keys(inputs.x_BTW)

    def finish(
        self, inputs: Inputs, lse: Tensor, selection: Selection, queries: Tensor, summaries: Tensor
    ) -> tuple[Tensor | None, dict[str, Tensor]]:
        """The indexer's weighted loss in training (None without an indexer), and the router's diagnostics."""
        diagnostics: dict[str, Tensor] = {}
        if self.collects_diagnostics:
            sampled = torch.linspace(
                0, selection.queries - 1, min(RECALL_QUERIES, selection.queries), device=lse.device
            )
            found = recall(inputs.q_BHTD, inputs.k_BKTD, selection, self.pattern.window, sampled.long())
            diagnostics |= {"recall": found.mean(), "union": union_of_neighbours(selection.chosen)}
        if not self.training:
            return None, diagnostics
        diagnostics |= block_use(selection, self.pattern.window)
        if self.indexer is None or not torch.is_grad_enabled():
            return None, diagnostics
        if summaries.shape[2] == 0:
            return unused(self.indexer), diagnostics
        q, k = inputs.q_BHTD, inputs.k_BKTD
        if self.warming_up:
            loss = dense_indexer_loss(queries, summaries, q, k, selection, self.pattern.window)
        else:
            mass = block_mass(q, k, lse, selection, backend=self.backend)
            loss = indexer_loss(queries, summaries, selection, mass)
        diagnostics["indexer_loss"] = loss.detach() / (selection.batch * selection.queries)
        return loss * self.training_settings.indexer_loss, diagnostics

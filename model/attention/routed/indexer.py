"""The indexer: small projections that score past blocks, and the loss that trains them to predict attention.

The score of a block is the product of the query and the mean of the indexer keys of its tokens, over sqrt(dim). Each
selector has a query; all share the keys. The loss is KL(p || softmax(scores)), where p is the attention that each block
receives, summed over its tokens and averaged over the query heads of the selector (the target of DSA and
SeerAttention). It covers the chosen blocks; during the warm-up, all past blocks under dense attention. The target has
no gradient.

A model that is trained already takes DSA's two stages (DeepSeek-V3.2, 2025): in the warm-up the layers attend densely
as before, and the indexers alone train; then all parameters train under routed attention."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kernels import Selection
from kernels.patterns import Routed
from kernels.patterns.base import require, require_int
from kernels.selection.routing import eligible_range
from model.config import ModelConfig

SCORES_AT_ONCE = {"cpu": 1 << 20, "cuda": 1 << 26}

Target = Callable[[slice], tuple[Tensor, Tensor]]
"""Maps a slice of queries to (the blocks that the loss covers, the attention that each block receives), both `[batch,
selectors, queries of the slice, blocks]`."""


@dataclass(frozen=True)
class IndexerTraining:
    """How an indexer is trained. A config gives these settings beside those of the routed pattern.

    A KL loss of weight `indexer_loss` trains the indexer to predict the attention that each chosen block receives. In
    the first `indexer_warmup` optimizer steps the target is dense attention to every past block, at the cost of dense
    attention. `indexer_gradient`: the loss also trains the layers below. `indexer_warmup_alone`: in the warm-up, no
    other parameter trains, and the layer attends densely.
    """

    indexer_loss: float
    indexer_warmup: int
    indexer_gradient: bool
    indexer_warmup_alone: bool = False

    def __post_init__(self) -> None:
        is_number = isinstance(self.indexer_loss, int | float) and not isinstance(self.indexer_loss, bool)
        in_range = is_number and 0 < self.indexer_loss < math.inf
        require(in_range, "indexer_loss", self.indexer_loss, "a positive, finite number")
        require_int("indexer_warmup", self.indexer_warmup, 0)
        gradient = self.indexer_gradient
        require(isinstance(gradient, bool), "indexer_gradient", gradient, "true or false")
        alone = self.indexer_warmup_alone
        require(isinstance(alone, bool), "indexer_warmup_alone", alone, "true or false")
        accepted = "false with indexer_warmup=0, a warm-up without steps"
        require(not alone or self.indexer_warmup > 0, "indexer_warmup_alone", alone, accepted)


class Indexer(nn.Module):
    def __init__(self, pattern: Routed, config: ModelConfig, training: IndexerTraining) -> None:
        super().__init__()
        self.pattern, self.train_input = pattern, training.indexer_gradient
        self.selectors = config.kv_heads if pattern.share == "group" else config.heads
        self.q_proj = nn.Linear(config.width, self.selectors * pattern.indexer_dim, bias=False)
        self.k_proj = nn.Linear(config.width, pattern.indexer_dim, bias=False)

    def queries(self, x_BTW: Tensor) -> Tensor:
        """Queries of all tokens, divided by sqrt(dim): `[batch, selectors, length, dim]`."""
        dim = self.pattern.indexer_dim
        found = self.q_proj(self._input(x_BTW)).unflatten(-1, (self.selectors, dim))
        return found.transpose(1, 2) * dim**-0.5

    def keys(self, x_BTW: Tensor) -> Tensor:
        """Keys of all tokens, which the selectors share: `[batch, 1, length, dim]`."""
        return self.k_proj(self._input(x_BTW))[:, None]

    def _input(self, x_BTW: Tensor) -> Tensor:
        return x_BTW if self.train_input else x_BTW.detach()


def chosen_target(selection: Selection, mass: Tensor, blocks: int) -> Target:
    """The target over the chosen blocks, of which `mass` `[batch, selectors, queries, top_k]` is the attention."""

    def target(piece: slice) -> tuple[Tensor, Tensor]:
        chosen = selection.chosen[:, :, piece]
        index = torch.where(chosen < 0, blocks, chosen).long()
        shape = (*chosen.shape[:3], blocks + 1)
        takes_part = torch.zeros(shape, dtype=torch.bool, device=mass.device).scatter_(3, index, True)
        received = torch.zeros(shape, dtype=mass.dtype, device=mass.device).scatter_(3, index, mass[:, :, piece])
        return takes_part[..., :blocks], received[..., :blocks]

    return target


def dense_target(
    q: Tensor, k: Tensor, selection: Selection, selectors: int, blocks: int, pattern: Routed, scale: float
) -> Target:
    """The target over all eligible blocks under dense causal attention: T² work, one slice of queries at a time."""
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    q, k = q.detach(), k.detach().to(dtype)
    document_start, query_index = selection.document_start, selection.query_index
    lowest, limit = eligible_range(document_start, pattern.window, pattern.block, query_index)
    key, index = torch.arange(k.shape[2], device=k.device), torch.arange(blocks, device=k.device)

    def target(piece: slice) -> tuple[Tensor, Tensor]:
        query = query_index[piece, None]
        past = (key <= query) & (key >= document_start[:, piece, None])
        scores = q[:, :, piece].to(dtype).unflatten(1, (k.shape[1], -1)) @ k[:, :, None].mT * scale
        weights = scores.masked_fill(~past[:, None, None], -torch.inf).softmax(-1)
        by_block = weights[..., : blocks * pattern.block].unflatten(-1, (blocks, pattern.block)).sum(-1)
        received = by_block.flatten(1, 2).unflatten(1, (selectors, -1)).mean(2)
        takes_part = (index >= lowest[:, piece, None]) & (index < limit[:, piece, None])
        return takes_part[:, None].expand_as(received), received

    return target


def indexer_loss(queries: Tensor, summaries: Tensor, target: Target, keys_a_query: int) -> Tensor:
    """KL(target || softmax(queries · summaries)) in nats, summed over queries and averaged over selectors.

    A query whose blocks receive no attention adds 0. Gradients flow to queries and summaries. They are computed in
    the forward pass, slice by slice, so that no scores are stored. keys_a_query: the number of elements of a target per
    query, which determines the size of a slice."""
    total, *gradients = _loss_and_gradients(queries.detach(), summaries.detach(), target, keys_a_query)
    # A sum whose gradients are the given ones, and whose value is subtracted again. Compiled by PyTorch 2.11, an
    # autograd.Function that fills its gradients slice by slice returns zeros.
    for tensor, gradient in zip((queries, summaries), gradients, strict=True):
        linear = (tensor * gradient).sum()
        total = total + (linear - linear.detach())
    return total


@torch.no_grad()
def _loss_and_gradients(
    queries: Tensor, summaries: Tensor, target: Target, keys_a_query: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The value of `indexer_loss` and its gradients to queries and summaries, in their dtypes."""
    dtype = torch.float64 if queries.dtype == torch.float64 else torch.float32
    batch, selectors, length, _ = queries.shape
    grad_queries = torch.zeros_like(queries, dtype=dtype)
    grad_summaries = torch.zeros_like(summaries, dtype=dtype)
    total = torch.zeros((), dtype=dtype, device=queries.device)
    at_once = max(1, SCORES_AT_ONCE["cuda" if queries.is_cuda else "cpu"] // (batch * selectors * keys_a_query))
    with torch.autocast(queries.device.type, enabled=False):
        keys = summaries.to(dtype)
        for first in range(0, length, at_once):
            piece = slice(first, first + at_once)
            takes_part, received = target(piece)
            states = queries[:, :, piece].to(dtype)
            received = torch.where(takes_part, received, 0.0).to(dtype)
            sums = received.sum(-1, keepdim=True)
            counts = sums > 0
            wanted = received / torch.where(counts, sums, 1.0)
            logits = (states @ keys.mT).masked_fill(~takes_part, torch.finfo(dtype).min)
            log_shares = logits.log_softmax(-1)
            part = torch.special.xlogy(wanted, wanted) - torch.where(takes_part, wanted * log_shares, 0.0)
            total += part.sum() / selectors
            grad = torch.where(takes_part & counts, log_shares.exp() - wanted, 0.0) / selectors
            # A NaN makes the gradients of its own row of logits NaN; a weight of 0 would not hide it from others.
            grad_queries[:, :, piece] = grad @ torch.where(keys.isfinite(), keys, 0.0)
            grad_summaries += grad.mT @ torch.where(states.isfinite(), states, 0.0)
    return total, grad_queries.to(queries.dtype), grad_summaries.to(summaries.dtype)

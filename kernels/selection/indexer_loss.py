"""The loss of an indexer, which trains a router's scores to predict attention.

The loss is KL(p || softmax(queries · summaries)) in nats, summed over queries and averaged over selectors. p is the
attention that each block receives, summed over its tokens and averaged over the query heads of the selector (the target
of DSA and SeerAttention); it has no gradient. A query whose blocks receive no attention adds 0.

Each target has a `torch.library` operator of flat tensors and scalars, which returns the loss and its gradients. It
computes slice by slice, so that no scores are stored; compilers and memory forecasts see one operator of any length.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from kernels.layout.selection import Selection
from kernels.selection.routing import eligible_range

SCORES_AT_ONCE = {"cpu": 1 << 20, "cuda": 1 << 26}
"""Elements of a target per slice of queries, by device type."""

Target = Callable[[slice], tuple[Tensor, Tensor]]
"""Maps a slice of queries to (the blocks that the loss covers, the attention that each block receives), both `[batch,
selectors, queries of the slice, blocks]`."""

LossAndGradients = tuple[Tensor, Tensor, Tensor]
"""The loss, and its gradients to queries and summaries, in their dtypes."""


def indexer_loss(queries: Tensor, summaries: Tensor, selection: Selection, mass: Tensor) -> Tensor:
    """The loss over the chosen blocks, a scalar in float32 (float64 for float64 inputs), differentiable in queries and
    summaries.

    queries `[batch, selectors, length, dim]`; summaries `[batch, selectors, blocks, dim]`; mass `[batch, selectors,
    length, slots]`: the attention that each chosen block receives (`block_mass`).
    """
    tensors = (queries.detach(), summaries.detach(), selection.chosen, mass)
    return _with_gradients(queries, summaries, torch.ops.farsight.indexer_loss(*tensors))


def dense_indexer_loss(
    queries: Tensor,
    summaries: Tensor,
    q: Tensor,
    k: Tensor,
    selection: Selection,
    window: int,
    scale: float | None = None,
) -> Tensor:
    """The loss over all eligible blocks (`eligible_range`), whose target is dense causal attention: T² work.

    queries, summaries and the result as for `indexer_loss`; q `[batch, heads, length, head_dim]`; k `[batch, kv_heads,
    keys, head_dim]`; window: that of the pattern; scale: of the attention, 1 / sqrt(head_dim) if None.
    """
    tensors = (queries.detach(), summaries.detach(), q.detach(), k.detach())
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    settings = (selection.document_start, selection.query_index, window, selection.block, scale)
    return _with_gradients(queries, summaries, torch.ops.farsight.dense_indexer_loss(*tensors, *settings))


def _with_gradients(queries: Tensor, summaries: Tensor, computed: LossAndGradients) -> Tensor:
    """The loss, with the computed gradients."""
    total, *gradients = computed
    # A sum whose gradients are the given ones, and whose value is subtracted again. Compiled by PyTorch 2.11, an
    # autograd.Function that fills its gradients slice by slice returns zeros.
    for tensor, gradient in zip((queries, summaries), gradients, strict=True):
        linear = (tensor * gradient).sum()
        total = total + (linear - linear.detach())
    return total


def chosen_blocks(
    queries: Tensor, summaries: Tensor, chosen: Tensor, mass: Tensor, slices: int | None = None
) -> LossAndGradients:
    """Computes the loss over the chosen blocks, and its gradients. slices: those of `_loss_and_gradients`."""
    blocks = summaries.shape[2]

    def target(piece: slice) -> tuple[Tensor, Tensor]:
        index = torch.where(chosen[:, :, piece] < 0, blocks, chosen[:, :, piece]).long()
        shape = (*index.shape[:3], blocks + 1)
        takes_part = torch.zeros(shape, dtype=torch.bool, device=mass.device).scatter_(3, index, True)
        received = torch.zeros(shape, dtype=mass.dtype, device=mass.device).scatter_(3, index, mass[:, :, piece])
        return takes_part[..., :blocks], received[..., :blocks]

    return _loss_and_gradients(queries, summaries, target, blocks, slices)


def eligible_blocks(
    queries: Tensor,
    summaries: Tensor,
    q: Tensor,
    k: Tensor,
    document_start: Tensor,
    query: Tensor,
    window: int,
    block: int,
    scale: float,
    slices: int | None = None,
) -> LossAndGradients:
    """Computes the loss over all eligible blocks, and its gradients. slices: those of `_loss_and_gradients`."""
    selectors, blocks = summaries.shape[1:3]
    k = k.to(_accumulation(q.dtype))
    lowest, limit = eligible_range(document_start, window, block, query)
    key, index = torch.arange(k.shape[2], device=k.device), torch.arange(blocks, device=k.device)

    def target(piece: slice) -> tuple[Tensor, Tensor]:
        past = (key <= query[piece, None]) & (key >= document_start[:, piece, None])
        scores = q[:, :, piece].to(k.dtype).unflatten(1, (k.shape[1], -1)) @ k[:, :, None].mT * scale
        weights = scores.masked_fill(~past[:, None, None], -torch.inf).softmax(-1)
        by_block = weights[..., : blocks * block].unflatten(-1, (blocks, block)).sum(-1)
        received = by_block.flatten(1, 2).unflatten(1, (selectors, -1)).mean(2)
        takes_part = (index >= lowest[:, piece, None]) & (index < limit[:, piece, None])
        return takes_part[:, None].expand_as(received), received

    return _loss_and_gradients(queries, summaries, target, k.shape[2] * (q.shape[1] // selectors), slices)


@torch.no_grad()
def _loss_and_gradients(
    queries: Tensor, summaries: Tensor, target: Target, keys_a_query: int, slices: int | None
) -> LossAndGradients:
    """The loss and its gradients, of the first `slices` slices of queries alone (None: all).

    keys_a_query: the number of elements of a target per query, which determines the size of a slice."""
    dtype = _accumulation(queries.dtype)
    batch, selectors, length, _ = queries.shape
    grad_queries = torch.zeros_like(queries, dtype=dtype)
    grad_summaries = torch.zeros(summaries.shape, dtype=dtype, device=summaries.device)
    total = torch.zeros((), dtype=dtype, device=queries.device)
    at_once = max(1, SCORES_AT_ONCE["cuda" if queries.is_cuda else "cpu"] // (batch * selectors * keys_a_query))
    with torch.autocast(queries.device.type, enabled=False):
        keys = summaries.to(dtype)
        for first in range(0, length, at_once)[:slices]:
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


def _accumulation(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


_of_chosen = torch.library.custom_op("farsight::indexer_loss", chosen_blocks, mutates_args=())
_of_eligible = torch.library.custom_op("farsight::dense_indexer_loss", eligible_blocks, mutates_args=())


@_of_chosen.register_fake
@_of_eligible.register_fake
def _(queries, summaries, *_):
    total = queries.new_empty((), dtype=_accumulation(queries.dtype))
    return total, torch.empty_like(queries), summaries.new_empty(summaries.shape)


@register_flop_formula(torch.ops.farsight.indexer_loss, get_raw=True)
def _flops_of_chosen(queries, summaries, *args, out_val=None, **kwargs) -> int:
    """Of three products: the scores, and the gradients to queries and summaries."""
    return 3 * 2 * queries.numel() * summaries.shape[2]


@register_flop_formula(torch.ops.farsight.dense_indexer_loss, get_raw=True)
def _flops_of_eligible(queries, summaries, q, k, *args, out_val=None, **kwargs) -> int:
    return _flops_of_chosen(queries, summaries) + 2 * q.numel() * k.shape[2]

"""Routing: scores of past key blocks -> causal top-k -> Selection, the key blocks of each query.

    summaries = block_means(router_keys, document_start, block)             one router key per block
    selection = select(router_queries, summaries, document_start, ...)      the blocks with the highest scores
    out, lse = attention(q, k, v, selection, return_lse=True)               attention to the chosen blocks alone

Blocks are counted in the packed sequence. The local window of query t, which another attention call covers, is the
keys from `floor((t - window + 1) / block) * block` to t. A block is eligible if it ends before that window and its last
token belongs to the query's document; if the document begins within the block, the query sees the document's tokens
only. So the window and the eligible blocks partition the query's past, and every eligible block holds a visible token.
**Routing is causal:** a block's summary is the mean over the block's own tokens, and all of them precede the query.

Scoring T tokens takes T^2 / block products: quadratic, with a small factor. Scores are computed in chunks of queries
and not kept.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels import dispatch
from kernels.layout.selection import Selection, transpose
from kernels.shapes import BLOCK_SIZES

INELIGIBLE = torch.iinfo(torch.int64).min
_LAST_INDEX = (1 << 31) - 1
_SCORES_PER_CHUNK = {"cpu": 1 << 20, "cuda": 1 << 26}


def document_starts(documents: Tensor) -> Tensor:
    """int32 `[batch, length]`: the sequence index of the first token of each token's document.

    documents: integer `[batch, length]`; a document is a run of equal numbers.
    """
    index = torch.arange(documents.shape[1], dtype=torch.int32, device=documents.device).expand(documents.shape)
    begins = torch.ones_like(documents, dtype=torch.bool)
    begins[:, 1:] = documents[:, 1:] != documents[:, :-1]
    return torch.where(begins, index, 0).cummax(-1).values.int()


def block_means(keys: Tensor, document_start: Tensor | None, block: int) -> Tensor:
    """One router key per whole block: the mean of the block's keys in the document of its last token.

    document_start int32 `[batch, length]`; None: each sequence is one document.

    keys `[batch, selectors, length, dim]` -> `[batch, selectors, length // block, dim]`, in float32 (float64 for
    float64 inputs) and differentiable. An incomplete last block is never eligible and has no summary.
    """
    batch, selectors, length, dim = keys.shape
    blocks = length // block
    by_block = keys[:, :, : blocks * block].reshape(batch, selectors, blocks, block, dim)
    if document_start is None:
        return (by_block.to(torch.float64 if keys.dtype == torch.float64 else torch.float32) * (1 / block)).sum(3)
    index = torch.arange(blocks * block, device=keys.device).view(blocks, block)
    ours = index >= document_start[:, block - 1 : blocks * block : block, None]  # [batch, blocks, block]
    weight = ours.to(torch.float64 if keys.dtype == torch.float64 else torch.float32)
    weight = weight / weight.sum(-1, keepdim=True)
    # A NaN of another document times a weight of 0 would be NaN.
    by_block = torch.where(ours[:, None, :, :, None], by_block, 0.0)
    return (by_block.to(weight.dtype) * weight[:, None, :, :, None]).sum(3)


def eligible_range(
    document_start: Tensor, window: int, block: int, query: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(lowest, limit), int32 `[batch, queries]`: a query may choose the key blocks lowest <= j < limit.

    query: the queries' own indices, int32 like `document_start`; None: 0, 1, ...
    """
    if query is None:
        query = torch.arange(document_start.shape[1], dtype=torch.int32, device=document_start.device)
    limit = torch.div(query - (window - 1), block, rounding_mode="floor").expand_as(document_start)
    return torch.div(document_start, block, rounding_mode="floor"), limit


def select(
    queries: Tensor,
    summaries: Tensor,
    document_start: Tensor,
    *,
    top_k: int,
    window: int,
    block: int,
    first_block: bool = False,
    backend: str = "auto",
    query: Tensor | None = None,
    keys: int | None = None,
) -> Selection:
    """Chooses for each query the `top_k` eligible blocks of highest score `query · summary`.

    queries `[batch, selectors, length, dim]` and summaries `[batch, selectors, keys // block, dim]` (`block_means`), of
    any floating dtype; document_start int32 `[batch, length]` (`document_starts`). `query`, int32 `[length]`: the index
    of each query among the `keys` keys, if the queries are only some tokens of a longer sequence. Scores are ranked in
    float32; ties go to the lower index, so a choice depends on its own scores alone, bit by bit. `first_block`: every
    query for which its document's first block is eligible attends to that block as well, in one slot more than top_k.
    Not differentiable: a router computes its own loss. backend: "auto", "blocked" (any device) or "triton".

    Raises ValueError for settings, shapes and backends that are not accepted.
    """
    for name, value in (("top_k", top_k), ("window", window)):
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}={value!r}: must be an integer >= 1")
    if block not in BLOCK_SIZES:
        raise ValueError(f"block={block!r}: must be one of {', '.join(map(str, BLOCK_SIZES))}")
    batch, selectors, length, dim = queries.shape
    keys = length if keys is None else keys
    if query is None and keys != length:
        raise ValueError(f"keys={keys}: must be the number of queries, {length}, if query is None")
    if query is not None and query.shape != (length,):
        raise ValueError(f"query {tuple(query.shape)}: must be [{length}]")
    if summaries.shape != (batch, selectors, keys // block, dim):
        accepted = (batch, selectors, keys // block, dim)
        raise ValueError(f"summaries {tuple(summaries.shape)}: must be {accepted} for queries {tuple(queries.shape)}")
    if document_start.shape != (batch, length):
        raise ValueError(f"document_start {tuple(document_start.shape)}: must be [{batch}, {length}]")
    document_start = document_start.contiguous()  # without documents it is one row, expanded to the batch
    slots = top_k + bool(first_block)
    refusal = lambda name: dispatch.triton_refusal("select", name, queries.device.type, queries.dtype)  # noqa: E731
    backend = dispatch.choose("select", backend, queries.is_cuda, refusal)
    tensors = torch.ops.farsight.select(
        *(queries.detach(), summaries.detach(), document_start, query),
        *(slots, window, block, bool(first_block), keys, backend),
    )
    return Selection(block, keys, tensors[0], document_start, *tensors[1:], query)


@torch.library.custom_op("farsight::select", mutates_args=())
def _select(
    queries: Tensor,
    summaries: Tensor,
    document_start: Tensor,
    query: Tensor | None,
    slots: int,
    window: int,
    block: int,
    first_block: bool,
    keys: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """(chosen, offsets, entries) of a Selection."""
    with torch.autocast(queries.device.type, enabled=False):  # a caller's autocast must not round the scores
        pick = dispatch.module("select", "triton").choose if backend == "triton" else choose_in_chunks
        chosen = pick(queries, summaries, document_start, slots, window, block, first_block, query)
    return chosen, *transpose(chosen, -(-keys // block))


@_select.register_fake
def _(queries, summaries, document_start, query, slots, window, block, first_block, keys, backend):
    batch, selectors, length, _ = queries.shape
    new = lambda *shape: queries.new_empty(shape, dtype=torch.int32)  # noqa: E731
    return (
        new(batch, selectors, length, slots),
        new(batch, selectors, -(-keys // block) + 1),
        new(batch, selectors, length * slots),
    )


def choose_in_chunks(
    queries: Tensor,
    summaries: Tensor,
    document_start: Tensor,
    slots: int,
    window: int,
    block: int,
    first_block: bool,
    query: Tensor | None = None,
) -> Tensor:
    """`Selection.chosen` in plain PyTorch; `query` as in `select`."""
    return choose(queries, summaries, *eligible_range(document_start, window, block, query), slots, first_block)


def choose(
    queries: Tensor, summaries: Tensor, lowest: Tensor | None, limit: Tensor, slots: int, first_block: bool
) -> Tensor:
    """`Selection.chosen` of any queries, given their `eligible_range`; scores are computed in chunks of queries.

    queries `[batch, selectors, queries, dim]`; summaries `[batch, summary heads, blocks, dim]`, each for selectors /
    summary heads consecutive selectors; lowest (None: 0) and limit int `[batch, queries]`.
    """
    batch, selectors, length, _ = queries.shape
    blocks = summaries.shape[2]
    if blocks == 0:
        return torch.full((batch, selectors, length, slots), -1, dtype=torch.int32, device=queries.device)
    dtype = torch.float64 if queries.dtype == torch.float64 else torch.float32
    transposed = summaries.to(dtype).mT
    index = torch.arange(blocks, device=queries.device)
    scores_per_chunk = _SCORES_PER_CHUNK["cuda" if queries.is_cuda else "cpu"]
    chunk_size, results = max(1, scores_per_chunk // (batch * selectors * blocks)), []
    for first in range(0, length, chunk_size):
        chunk = slice(first, first + chunk_size)
        rows = queries[:, :, chunk].to(dtype).reshape(batch, summaries.shape[1], -1, queries.shape[3])
        ranks = ranked((rows @ transposed).view(batch, selectors, -1, blocks), index)
        ineligible = index >= limit[:, None, chunk, None]
        low = 0 if lowest is None else lowest[:, None, chunk, None]
        if lowest is not None:
            ineligible = ineligible | (index < low)
        if first_block:
            ranks = torch.where(index == low, torch.iinfo(torch.int64).max - index, ranks)
        best = ranks.masked_fill(ineligible, INELIGIBLE).topk(min(slots, blocks), -1).values
        found = (_LAST_INDEX - (best & _LAST_INDEX)).masked_fill(best == INELIGIBLE, blocks).sort(-1).values
        results.append(found.masked_fill(found == blocks, -1).int())
    chosen = torch.cat(results, 2) if len(results) > 1 else results[0]
    return F.pad(chosen, (0, slots - chosen.shape[3]), value=-1) if chosen.shape[3] < slots else chosen


def ranked(scores: Tensor, index: Tensor) -> Tensor:
    """int64 ranks that sort by float32 score, then by lower index: the score's bits in the upper half, the index below.

    The bits of a float, read as an integer, rise with its value if it is positive and fall if it is negative.
    """
    bits = (scores.float() + 0.0).view(torch.int32)  # -0.0 + 0.0 = 0.0
    ordered = bits ^ ((bits >> 31) & _LAST_INDEX)
    return (ordered.long() << 32) | (_LAST_INDEX - index)

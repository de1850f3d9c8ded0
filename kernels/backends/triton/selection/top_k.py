"""Causal top-k of block scores in one kernel: a program keeps the best blocks of some queries while it computes scores.

Each score becomes one 64-bit integer: its order-preserving bits in the upper half, and the negated block index in the
lower. All integers differ, so the result depends on the scores alone, and among equal scores the lower block wins
(`ranked` in kernels/selection/routing.py does the same in PyTorch). A tile of scores is searched only while it contains
a score above the worst one kept, which is rare late in a long sequence.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.backends.triton import common

QUERIES, BLOCKS = 64, 64
"""Queries and blocks of the scores that a program computes in one step."""


def unsupported(device: str, dtype: torch.dtype) -> str | None:
    """Why this kernel cannot serve queries of such a dtype, with what is accepted; None if it can."""
    return common.unsupported(device, dtype)


def choose(
    queries: Tensor,
    summaries: Tensor,
    document_start: Tensor,
    slots: int,
    window: int,
    block: int,
    first_block: bool,
    query: Tensor | None = None,
) -> Tensor:
    """`Selection.chosen`, see kernels.selection.routing.select. Products in the queries' dtype, sums in float32."""
    batch, selectors, length, dim = queries.shape
    chosen = torch.empty(batch, selectors, length, slots, dtype=torch.int32, device=queries.device)
    queries, summaries = (t if t.stride(-1) == 1 else t.contiguous() for t in (queries, summaries.to(queries.dtype)))
    _choose[(triton.cdiv(length, QUERIES), batch * selectors)](
        queries,
        summaries,
        document_start.contiguous(),
        document_start if query is None else query.contiguous(),
        chosen,
        *queries.stride()[:3],
        *summaries.stride()[:3],
        selectors,
        length,
        summaries.shape[2],
        window,
        SLOTS=slots,
        KEPT=max(triton.next_power_of_2(slots), 2),
        FIRST_BLOCK=first_block,
        INDEXED=query is not None,
        BLOCK=block,
        DIM=dim,
        D=max(triton.next_power_of_2(dim), 16),
        M=QUERIES,
        N=BLOCKS,
        PRECISION="ieee" if queries.dtype == torch.float32 else "tf32",
        num_warps=4,
    )
    return chosen


@triton.jit(do_not_specialize=["selectors", "length", "blocks", "window"])
def _choose(
    queries,
    summaries,
    document_start,
    query_index,
    chosen,
    query_batch,
    query_selector,
    query_step,
    summary_batch,
    summary_selector,
    summary_step,
    selectors,
    length,
    blocks,
    window,
    SLOTS: tl.constexpr,
    KEPT: tl.constexpr,
    FIRST_BLOCK: tl.constexpr,
    INDEXED: tl.constexpr,
    BLOCK: tl.constexpr,
    DIM: tl.constexpr,
    D: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    INELIGIBLE: tl.constexpr = -(2**63)
    INT64_MAX: tl.constexpr = 2**63 - 1
    LAST_INDEX: tl.constexpr = 2**31 - 1
    batch = (tl.program_id(1) // selectors).to(tl.int64)
    selector = (tl.program_id(1) % selectors).to(tl.int64)
    # The last queries have the most blocks, so their programs start first.
    query = (tl.num_programs(0) - 1 - tl.program_id(0)) * M + tl.arange(0, M)
    live = query < length
    column = tl.arange(0, D)
    q = tl.load(
        queries
        + batch * query_batch
        + selector * query_selector
        + query.to(tl.int64)[:, None] * query_step
        + column[None, :],
        mask=live[:, None] & (column < DIM)[None, :],
        other=0.0,
    )
    first = tl.load(document_start + batch * length + query, mask=live, other=0)
    lowest = tl.where(live, first // BLOCK, blocks)
    # Floor division: whole blocks are added and subtracted, because `//` rounds negative numbers towards zero.
    up = (window + BLOCK - 1) // BLOCK
    index_of_query = tl.load(query_index + query, mask=live, other=0) if INDEXED else query
    limit = tl.where(live, (index_of_query - window + 1 + up * BLOCK) // BLOCK - up, 0)
    limit = tl.minimum(limit, blocks)

    place = tl.arange(0, KEPT)
    wide = place.to(tl.int64)
    empty = tl.where(place < SLOTS, INELIGIBLE + 1 + wide, INT64_MAX - wide)  # all differ; below every score
    kept = tl.zeros([M, KEPT], tl.int64) + empty[None, :]
    summary_base = summaries + batch * summary_batch + selector * summary_selector
    for start in range(tl.min(lowest, 0) // N * N, tl.max(limit, 0), N):
        index = start + tl.arange(0, N)
        summary = tl.load(
            summary_base + index.to(tl.int64)[:, None] * summary_step + column[None, :],
            mask=(index < blocks)[:, None] & (column < DIM)[None, :],
            other=0.0,
        )
        scores = tl.dot(q, summary.T, input_precision=PRECISION)
        scores = tl.where(scores == 0, 0.0, scores)  # -0.0 = 0.0
        bits = scores.to(tl.int32, bitcast=True)
        bits = bits ^ ((bits >> 31) & LAST_INDEX)
        ranks = (bits.to(tl.int64) << 32) | (LAST_INDEX - index).to(tl.int64)[None, :]
        if FIRST_BLOCK:
            always = INT64_MAX - KEPT - index.to(tl.int64)
            ranks = tl.where(index[None, :] == lowest[:, None], always[None, :], ranks)
        eligible = (index[None, :] >= lowest[:, None]) & (index[None, :] < limit[:, None])
        ranks = tl.where(eligible, ranks, INELIGIBLE)
        best = tl.max(ranks, 1)
        worst = tl.min(kept, 1)
        while tl.max((best > worst).to(tl.int32), 0) > 0:
            better = best > worst
            kept = tl.where((kept == worst[:, None]) & better[:, None], best[:, None], kept)
            ranks = tl.where(ranks == best[:, None], INELIGIBLE, ranks)
            best = tl.max(ranks, 1)
            worst = tl.min(kept, 1)

    found = (LAST_INDEX - (kept & LAST_INDEX)).to(tl.int32)
    if FIRST_BLOCK:
        found = tl.where(kept >= INT64_MAX - KEPT - tl.cast(blocks, tl.int64), lowest[:, None], found)
    missing = (kept <= INELIGIBLE + KEPT) | (place >= SLOTS)[None, :]
    found = tl.sort(tl.where(missing, LAST_INDEX, found), 1)
    found = tl.where(found == LAST_INDEX, -1, found)
    line = (tl.program_id(1).to(tl.int64) * length + query) * SLOTS
    tl.store(chosen + line[:, None] + place[None, :], found, mask=live[:, None] & (place < SLOTS)[None, :])

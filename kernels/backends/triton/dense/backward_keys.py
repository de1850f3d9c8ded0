"""dK and dV by columns: a program walks the column of tiles of a block of keys, or one chunk of a long column.

Letters as in backward.py.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.backends.triton.common import LOG2_E, describe, load_words, masked
from kernels.backends.triton.dense.tile_sizes import Config, choose
from kernels.backends.triton.dense.work import ITEM_FIELDS, Work, plan_of
from kernels.layout.block_layout import BlockLayout


def grad_keys(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    row_stats: Tensor,
    layout: BlockLayout,
    scale: float,
    config: Config | None = None,
) -> tuple[Tensor, Tensor]:
    """(dk, dv), by columns; long columns are split into chunks."""
    batch, heads, _, head_dim = q.shape
    kv_heads = k.shape[1]
    config = config or choose("keys", q.dtype, head_dim, layout.block)
    columns = triton.next_power_of_2(head_dim)
    plan = plan_of(layout)
    work = plan.columns(batch, kv_heads)
    dk, dv = torch.empty_like(k), torch.empty_like(v)
    sums = torch.empty(max(work.buffers, 1), 2, layout.block, columns, dtype=torch.float32, device=q.device)
    _grad_keys[(len(work.items) * (layout.block // config.keys),)](
        describe(q, config.queries, columns),
        describe(k, config.keys, columns),
        describe(v, config.keys, columns),
        describe(grad_out, config.queries, columns),
        describe(dk, config.keys, columns),
        describe(dv, config.keys, columns),
        row_stats,
        sums,
        work.items,
        layout.columns.blocks,
        layout.columns.tiles,
        plan.transposed_masks,
        scale * LOG2_E,
        scale,
        row_stats.shape[-1] // layout.block,
        heads,
        GROUP=heads // kv_heads,
        BLOCK=layout.block,
        WORDS=layout.masks.shape[2],
        M=config.queries,
        N=config.keys,
        D=columns,
        PRECISION="ieee" if q.dtype == torch.float32 else "tf32",
        SPLIT=work.buffers > 0,
        num_warps=config.warps,
        num_stages=config.stages,
        maxnreg=config.registers,
    )
    if work.buffers:
        sum_chunks(sums, work, dk, dv, scale, layout)
    return dk, dv


def sum_chunks(sums: Tensor, work: Work, dk: Tensor, dv: Tensor, scale: float, layout: BlockLayout) -> None:
    """Writes dk and dv of the columns of `work` that were split, from the sums of their chunks, float32 `[buffers, 2,
    block, head_dim padded]`."""
    rows_per_program = min(16, layout.block)
    _sum_chunks[(len(work.chunks), layout.block // rows_per_program)](
        sums,
        work.chunks,
        dk,
        dv,
        *dk.stride(),
        *dv.stride(),
        scale,
        layout.keys,
        layout.columns.start.shape[2],
        dk.shape[1],
        HEAD_DIM=dk.shape[-1],
        D=sums.shape[-1],
        BLOCK=layout.block,
        M=rows_per_program,
        num_warps=4,
    )


@triton.jit(do_not_specialize=["query_blocks", "heads"])
def _grad_keys(
    q_desc,
    k_desc,
    v_desc,
    do_desc,
    dk_desc,
    dv_desc,
    row_stats,
    sums,
    items,
    blocks,
    tiles,
    masks,
    log2_scale,
    scale,
    query_blocks,
    heads,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
    WORDS: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    D: tl.constexpr,
    PRECISION: tl.constexpr,
    SPLIT: tl.constexpr,
):
    # Neighbouring programs compute parts of one block, which read the same Q and dO.
    PARTS: tl.constexpr = BLOCK // N
    STEPS: tl.constexpr = BLOCK // M
    part = tl.program_id(0) % PARTS
    item = items + tl.program_id(0) // PARTS * ITEM_FIELDS
    batch = tl.load(item)
    kv_head = tl.load(item + 1)
    column = tl.load(item + 2)
    first = tl.load(item + 3)
    count = tl.load(item + 4) * STEPS
    partial = tl.load(item + 5) * STEPS
    buffer = tl.load(item + 6)
    if buffer == -2:
        return

    start = column * BLOCK + part * N
    rows = part * N + tl.arange(0, N)
    k = k_desc.load([batch, kv_head, start, 0]).reshape(N, D)
    v = v_desc.load([batch, kv_head, start, 0]).reshape(N, D)
    dk = tl.zeros([N, D], tl.float32)
    dv = tl.zeros([N, D], tl.float32)
    padded = query_blocks * BLOCK
    first_head = batch * heads + kv_head * GROUP

    # The list of query blocks is walked once per query head of the group.
    next_block = tl.load(blocks + first, mask=count > 0, other=0)
    next_tile = tl.load(tiles + first, mask=count > 0, other=0)
    head_in_group = 0
    step = 0
    for _ in tl.range(0, count * GROUP):
        part_of_tile = step % STEPS
        query = next_block * BLOCK + part_of_tile * M
        tile = next_tile
        head = kv_head * GROUP + head_in_group
        at = row_stats + (first_head + head_in_group).to(tl.int64) * 2 * padded + query + tl.arange(0, M)
        is_partial = step < partial
        last = step + 1 == count
        head_in_group = tl.where(last, head_in_group + 1, head_in_group)
        step = tl.where(last, 0, step + 1)
        next_block = tl.load(blocks + first + step // STEPS)
        next_tile = tl.load(tiles + first + step // STEPS)
        q = q_desc.load([batch, head, query, 0]).reshape(M, D)
        mask = masks + tile.to(tl.int64) * (BLOCK * WORDS)
        a, b, c, d = load_words(is_partial, mask, rows, part_of_tile * M, WORDS, M)
        # Always true: Triton does not stage conditional loads through shared memory, which saves two barriers.
        if count > 0:
            lse = tl.load(at)
            delta = tl.load(at + padded)
        else:
            lse = tl.zeros([M], tl.float32)
            delta = tl.zeros([M], tl.float32)
        st = tl.dot(k, q.T, input_precision=PRECISION)
        if is_partial:
            st = masked(st, a, b, c, d, part_of_tile * M, M)
        pt = tl.exp2(st * log2_scale - lse[None, :])
        do = do_desc.load([batch, head, query, 0]).reshape(M, D)
        dv = tl.dot(pt.to(do.dtype), do, dv, input_precision=PRECISION)
        dpt = tl.dot(v, do.T, input_precision=PRECISION)
        dst = pt * (dpt - delta[None, :])
        dk = tl.dot(dst.to(q.dtype), q, dk, input_precision=PRECISION)

    if SPLIT and buffer >= 0:
        at = sums + (buffer.to(tl.int64) * 2 * BLOCK + rows[:, None]) * D + tl.arange(0, D)[None, :]
        tl.store(at, dk)
        tl.store(at + BLOCK * D, dv)
    else:
        dk_desc.store([batch, kv_head, start, 0], (dk * scale).to(k.dtype).reshape(1, 1, N, D))
        dv_desc.store([batch, kv_head, start, 0], dv.to(v.dtype).reshape(1, 1, N, D))


@triton.jit(do_not_specialize=["keys", "columns", "kv_heads"])
def _sum_chunks(
    sums,
    chunks,
    dk,
    dv,
    dk_batch,
    dk_head,
    dk_key,
    dk_column,
    dv_batch,
    dv_head,
    dv_key,
    dv_column,
    scale,
    keys,
    columns,
    kv_heads,
    HEAD_DIM: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    M: tl.constexpr,
):
    """dK and dV of the columns that were split: the sums of their chunks, always in the same order."""
    index = tl.program_id(0)
    buffer = tl.load(chunks + index * 2)
    count = tl.load(chunks + index * 2 + 1)
    if count == 1:
        return
    batch = (index // columns // kv_heads).to(tl.int64)
    kv_head = ((index // columns) % kv_heads).to(tl.int64)
    row = tl.program_id(1) * M + tl.arange(0, M)
    column = tl.arange(0, D)
    at = sums + (buffer.to(tl.int64) * 2 * BLOCK + row[:, None]) * D + column[None, :]
    sum_k = tl.zeros([M, D], tl.float32)
    sum_v = tl.zeros([M, D], tl.float32)
    for _ in range(0, count):
        sum_k += tl.load(at)
        sum_v += tl.load(at + BLOCK * D)
        at += 2 * BLOCK * D
    key = ((index % columns) * BLOCK + row).to(tl.int64)[:, None]
    inside = (key < keys) & (column < HEAD_DIM)[None, :]
    to_k = dk + batch * dk_batch + kv_head * dk_head + key * dk_key + column[None, :] * dk_column
    to_v = dv + batch * dv_batch + kv_head * dv_head + key * dv_key + column[None, :] * dv_column
    tl.store(to_k, (sum_k * scale).to(dk.dtype.element_ty), mask=inside)
    tl.store(to_v, sum_v.to(dv.dtype.element_ty), mask=inside)

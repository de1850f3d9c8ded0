"""dQ by rows: a program walks the row of tiles of a block of queries, as in the forward pass.

Letters as in backward.py.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.backends.triton.common import LOG2_E, describe, load_words, masked
from kernels.backends.triton.dense.tile_sizes import Config, choose
from kernels.backends.triton.dense.work import ITEM_FIELDS, plan_of
from kernels.layout.block_layout import BlockLayout


def grad_queries(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    row_stats: Tensor,
    layout: BlockLayout,
    scale: float,
    config: Config | None = None,
) -> Tensor:
    """dq, by rows."""
    batch, heads, _, head_dim = q.shape
    kv_heads = k.shape[1]
    config = config or choose("queries", q.dtype, head_dim, layout.block)
    columns = triton.next_power_of_2(head_dim)
    items = plan_of(layout).rows(batch, kv_heads).items
    group = heads // kv_heads
    dq = torch.empty_like(q)
    _grad_queries[(len(items) * group * (layout.block // config.queries),)](
        describe(q, config.queries, columns),
        describe(k, config.keys, columns),
        describe(v, config.keys, columns),
        describe(grad_out, config.queries, columns),
        describe(dq, config.queries, columns),
        row_stats,
        items,
        layout.rows.blocks,
        layout.rows.tiles,
        layout.masks,
        scale * LOG2_E,
        scale,
        row_stats.shape[-1] // layout.block,
        heads,
        GROUP=group,
        BLOCK=layout.block,
        WORDS=layout.masks.shape[2],
        M=config.queries,
        N=config.keys,
        D=columns,
        PRECISION="ieee" if q.dtype == torch.float32 else "tf32",
        num_warps=config.warps,
        num_stages=config.stages,
        maxnreg=config.registers,
    )
    return dq


@triton.jit(do_not_specialize=["query_blocks", "heads"])
def _grad_queries(
    q_desc,
    k_desc,
    v_desc,
    do_desc,
    dq_desc,
    row_stats,
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
):
    # The loop is that of the forward pass.
    padded = query_blocks * BLOCK
    PARTS: tl.constexpr = BLOCK // M
    STEPS: tl.constexpr = BLOCK // N
    part = tl.program_id(0) % PARTS
    item = items + tl.program_id(0) // (PARTS * GROUP) * ITEM_FIELDS
    batch = tl.load(item)
    kv_head = tl.load(item + 1)
    head = kv_head * GROUP + (tl.program_id(0) // PARTS) % GROUP
    row = tl.load(item + 2)
    first = tl.load(item + 3)
    count = tl.load(item + 4) * STEPS
    partial = tl.load(item + 5) * STEPS

    start = row * BLOCK + part * M
    rows = part * M + tl.arange(0, M)
    q = q_desc.load([batch, head, start, 0]).reshape(M, D)
    do = do_desc.load([batch, head, start, 0]).reshape(M, D)
    at = row_stats + (batch * heads + head).to(tl.int64) * 2 * padded + start + tl.arange(0, M)
    lse = tl.load(at)
    delta = tl.load(at + padded)
    dq = tl.zeros([M, D], tl.float32)

    next_block = tl.load(blocks + first, mask=count > 0, other=0)
    next_tile = tl.load(tiles + first, mask=count > 0, other=0)
    for step in tl.range(0, count):
        part_of_tile = step % STEPS
        key = next_block * BLOCK + part_of_tile * N
        tile = next_tile
        ahead = first + tl.minimum(step + 1, count - 1) // STEPS
        next_block = tl.load(blocks + ahead)
        next_tile = tl.load(tiles + ahead)
        is_partial = step < partial
        mask = masks + tile.to(tl.int64) * (BLOCK * WORDS)
        a, b, c, d = load_words(is_partial, mask, rows, part_of_tile * N, WORDS, N)
        k = k_desc.load([batch, kv_head, key, 0]).reshape(N, D)
        v = v_desc.load([batch, kv_head, key, 0]).reshape(N, D)
        s = tl.dot(q, k.T, input_precision=PRECISION)
        if is_partial:
            s = masked(s, a, b, c, d, part_of_tile * N, N)
        p = tl.exp2(s * log2_scale - lse[:, None])
        dp = tl.dot(do, v.T, input_precision=PRECISION)
        ds = p * (dp - delta[:, None])
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)

    dq_desc.store([batch, head, start, 0], (dq * scale).to(q.dtype).reshape(1, 1, M, D))

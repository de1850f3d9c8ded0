"""Forward: a program walks one row of tiles (a block of queries of one head) with FlashAttention's online softmax.

Letters in the kernel: s scores, p weights, m running maximum (of log2(e) * scale * s), l running sum.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.backends.triton.common import LN_2, LOG2_E, addressable, describe, load_words, masked, positive_scale
from kernels.backends.triton.dense.tile_sizes import Config, choose
from kernels.backends.triton.dense.work import ITEM_FIELDS, plan_of
from kernels.layout.block_layout import BlockLayout


def forward(
    q: Tensor, k: Tensor, v: Tensor, layout: BlockLayout, scale: float, config: Config | None = None
) -> tuple[Tensor, Tensor]:
    """(out, lse), see kernels/backends/__init__.py; lse is float32. `config`: launch settings, for benchmarks."""
    q, scale = positive_scale(q, scale)
    q, k, v = addressable(q), addressable(k), addressable(v)
    batch, heads, queries, head_dim = q.shape
    kv_heads = k.shape[1]
    # With q's strides: transposed to the model's [batch, tokens, heads, head_dim], it needs no copy.
    out = torch.empty_like(q)
    lse = torch.empty(batch, heads, queries, dtype=torch.float32, device=q.device)
    config = config or choose("forward", q.dtype, head_dim, layout.block)
    columns = triton.next_power_of_2(head_dim)
    items = plan_of(layout).rows(batch, kv_heads).items
    group = heads // kv_heads
    _forward[(len(items) * group * (layout.block // config.queries),)](
        describe(q, config.queries, columns),
        describe(k, config.keys, columns),
        describe(v, config.keys, columns),
        describe(out, config.queries, columns),
        lse,
        items,
        layout.rows.blocks,
        layout.rows.tiles,
        layout.masks,
        scale * LOG2_E,
        queries,
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
    return out, lse


@triton.jit(do_not_specialize=["queries", "heads"])
def _forward(
    q_desc,
    k_desc,
    v_desc,
    out_desc,
    lse,
    items,
    blocks,
    tiles,
    masks,
    scale,
    queries,
    heads,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
    WORDS: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # Neighbouring programs compute parts of one block, then heads of one group, which read the same K and V.
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
    m = tl.full([M], float("-inf"), tl.float32)
    l = tl.zeros([M], tl.float32)  # noqa: E741
    acc = tl.zeros([M, D], tl.float32)

    # The next tile's index is read one step early: TMA cannot start before it is known.
    next_block = tl.load(blocks + first, mask=count > 0, other=0)
    next_tile = tl.load(tiles + first, mask=count > 0, other=0)
    for step in tl.range(0, count):
        part_of_tile = step % STEPS
        key = next_block * BLOCK + part_of_tile * N
        tile = next_tile
        ahead = first + tl.minimum(step + 1, count - 1) // STEPS
        next_block = tl.load(blocks + ahead)
        next_tile = tl.load(tiles + ahead)
        k = k_desc.load([batch, kv_head, key, 0]).reshape(N, D)
        s = tl.dot(q, k.T, input_precision=PRECISION)
        if step < partial:
            mask = masks + tile.to(tl.int64) * (BLOCK * WORDS)
            a, b, c, d = load_words(True, mask, rows, part_of_tile * N, WORDS, N)
            s = masked(s, a, b, c, d, part_of_tile * N, N)
        highest = tl.maximum(m, tl.max(s, 1) * scale)
        # In a row without visible keys so far, any finite maximum gives p = 0.
        finite = tl.where(highest == float("-inf"), 0.0, highest)
        p = tl.exp2(s * scale - finite[:, None])
        alpha = tl.exp2(m - finite)
        l = l * alpha + tl.sum(p, 1)  # noqa: E741
        acc = acc * alpha[:, None]
        v = v_desc.load([batch, kv_head, key, 0]).reshape(N, D)
        acc = tl.dot(p.to(v.dtype), v, acc, input_precision=PRECISION)
        m = highest

    seen = l != 0  # True for NaN, too
    acc = acc / tl.where(seen, l, 1.0)[:, None]
    out_desc.store([batch, head, start, 0], acc.to(q.dtype).reshape(1, 1, M, D))
    query = start + tl.arange(0, M)
    at = (batch * heads + head).to(tl.int64) * queries + query
    tl.store(
        lse + at, tl.where(seen, (m + tl.log2(tl.where(seen, l, 1.0))) * LN_2, float("-inf")), mask=query < queries
    )

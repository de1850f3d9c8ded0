"""dQ by rows: a producer warp and two consumers of 64 queries, which walk a row of tiles in steps of 64 keys.

Each step issues its own S = Q K^T and dP = dO V^T, and dQ += dS K of the step before it, which runs during this step's
arithmetic. Before a row's first step, the consumers compute delta, and write lse and delta for the kernel of dK and dV.
Letters as in kernels/backends/triton/dense/backward.py.
"""

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from kernels.backends.hopper.common import (
    CONSUMER_REGISTERS,
    PRODUCER_REGISTERS,
    accumulator,
    barriers,
    describe,
    item_of_round,
    load_item,
    load_words,
    masked,
    pack_pairs,
    processors,
    rounds_of_program,
    synchronize,
    unpack_pairs,
)
from kernels.backends.triton.common import LOG2_E
from kernels.backends.triton.dense.work import plan_of
from kernels.layout.block_layout import BlockLayout

STAGES = 3
"""Buffers of 64 keys and of 64 values."""


def grad_queries(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    layout: BlockLayout,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """(dq, row_stats as in kernels/backends/triton/dense/backward.py); 16-bit tensors are `addressable`."""
    batch, heads, queries, head_dim = q.shape
    kv_heads, block = k.shape[1], layout.block
    dq = torch.empty_like(q)
    row_stats = torch.empty(batch, heads, 2, -(-queries // block) * block, dtype=torch.float32, device=q.device)
    lse = lse.contiguous()
    items = plan_of(layout).rows(batch, kv_heads).items
    group = heads // kv_heads
    count = len(items) * group
    _grad_queries[(min(count, processors(q.device)),)](
        describe(q, 64),
        describe(grad_out, 64),
        describe(k, 64),
        describe(v, 64),
        describe(out, 64),
        describe(dq, 64),
        row_stats,
        lse,
        lse if grad_lse is None else grad_lse.contiguous(),
        items,
        layout.rows.blocks,
        layout.rows.tiles,
        layout.masks,
        count,
        queries,
        row_stats.shape[-1],
        heads,
        scale * LOG2_E,
        scale,
        GROUP=group,
        STAGES=STAGES,
        D=head_dim,
        HAS_GRAD_LSE=grad_lse is not None,
        num_warps=4,
    )
    return dq, row_stats


@gluon.jit(do_not_specialize=["count", "queries", "padded", "heads"])
def _grad_queries(
    q_desc,
    do_desc,
    k_desc,
    v_desc,
    out_desc,
    dq_desc,
    row_stats,
    lse,
    grad_lse,
    items,
    blocks,
    tiles,
    masks,
    count,
    queries,
    padded,
    heads,
    log2_scale,
    scale,
    GROUP: gl.constexpr,
    STAGES: gl.constexpr,
    D: gl.constexpr,
    HAS_GRAD_LSE: gl.constexpr,
):
    DTYPE: gl.constexpr = q_desc.dtype
    q = gl.allocate_shared_memory(DTYPE, [2, 1, 1, 64, D], q_desc.layout)
    do = gl.allocate_shared_memory(DTYPE, [2, 1, 1, 64, D], do_desc.layout)
    k = gl.allocate_shared_memory(DTYPE, [STAGES, 1, 1, 64, D], k_desc.layout)
    v = gl.allocate_shared_memory(DTYPE, [STAGES, 1, 1, 64, D], v_desc.layout)
    dq = gl.allocate_shared_memory(DTYPE, [2, 1, 1, 64, D], dq_desc.layout)
    out = gl.allocate_shared_memory(DTYPE, [2, 1, 1, 64, D], out_desc.layout)
    q_full, q_empty = barriers(2, 1), barriers(2, 1)
    k_full, k_empty = barriers(STAGES, 1), barriers(STAGES, 2)
    v_full, v_empty = barriers(STAGES, 1), barriers(STAGES, 2)
    unused = barriers(1, 1)
    out_full, out_empty = barriers(2, 1), barriers(2, 1)
    fence_async_shared()
    signals = (q_full, q_empty, k_full, k_empty, v_full, v_empty, unused, out_full, out_empty)
    shared = (q, do, k, v, dq, out)
    descriptors = (q_desc, do_desc, k_desc, v_desc, dq_desc, out_desc)
    lists = (row_stats, lse, grad_lse, items, blocks, tiles, masks)
    sizes = (count, queries, padded, heads, log2_scale, scale)
    gl.warp_specialize(
        [
            (_consumer, (signals, shared, descriptors, lists, sizes, 0, GROUP, STAGES, D, HAS_GRAD_LSE)),
            (_consumer, (signals, shared, descriptors, lists, sizes, 1, GROUP, STAGES, D, HAS_GRAD_LSE)),
            (_producer, (signals, shared, descriptors, lists, sizes, GROUP, STAGES, D)),
        ],
        [4, 1],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )


@gluon.jit
def _producer(signals, shared, descriptors, lists, sizes, GROUP: gl.constexpr, STAGES: gl.constexpr, D: gl.constexpr):
    q_full, q_empty, k_full, k_empty, v_full, v_empty, unused, out_full, out_empty = signals
    q, do, k, v, dq_out, out = shared
    q_desc, do_desc, k_desc, v_desc, dq_desc, out_desc = descriptors
    row_stats, row_lse, row_grad_lse, items, blocks, tiles, masks = lists
    count, queries, padded, heads, log2_scale, scale = sizes
    read = 0  # steps, over all rows
    for round_ in range(0, rounds_of_program(count)):
        index = item_of_round(round_, count)
        batch, kv_head, row, first, tiles_of_row, _, _ = load_item(items, index // GROUP)
        head = kv_head * GROUP + index % GROUP
        for part in gl.static_range(2):
            mbarrier.wait(out_empty.index(part), (round_ & 1) ^ 1)
            mbarrier.expect(out_full.index(part), 64 * D * 2)
            tma.async_copy_global_to_shared(
                out_desc, [batch, head, row * 128 + part * 64, 0], out_full.index(part), out.index(part)
            )
        for part in gl.static_range(2):
            query = row * 128 + part * 64
            mbarrier.wait(q_empty.index(part), (round_ & 1) ^ 1)
            mbarrier.expect(q_full.index(part), 2 * 64 * D * 2)
            tma.async_copy_global_to_shared(q_desc, [batch, head, query, 0], q_full.index(part), q.index(part))
            tma.async_copy_global_to_shared(do_desc, [batch, head, query, 0], q_full.index(part), do.index(part))
        for step in range(0, tiles_of_row * 2):
            key = gl.load(blocks + first + step // 2) * 128 + step % 2 * 64
            stage = read % STAGES
            mbarrier.wait(k_empty.index(stage), ((read // STAGES) & 1) ^ 1)
            mbarrier.expect(k_full.index(stage), 64 * D * 2)
            tma.async_copy_global_to_shared(k_desc, [batch, kv_head, key, 0], k_full.index(stage), k.index(stage))
            mbarrier.wait(v_empty.index(stage), ((read // STAGES) & 1) ^ 1)
            mbarrier.expect(v_full.index(stage), 64 * D * 2)
            tma.async_copy_global_to_shared(v_desc, [batch, kv_head, key, 0], v_full.index(stage), v.index(stage))
            read += 1


@gluon.jit
def _step(
    signals, shared, log2_scale, read, later, words, ds, dq, lse, delta, PART: gl.constexpr, STAGES: gl.constexpr,
    D: gl.constexpr, DTYPE: gl.constexpr, MASKED: gl.constexpr,
):  # fmt: skip
    """(dq, ds packed) after 64 keys. later: whether the row had a step before this one, whose `ds` is passed."""
    q_full, q_empty, k_full, k_empty, v_full, v_empty, unused, out_full, out_empty = signals
    q, do, k, v, dq_out, out = shared
    LEFT: gl.constexpr = gl.DotOperandLayout(0, accumulator(D), 2)
    zero = gl.zeros([64, 64], gl.float32, accumulator(64))
    stage = read % STAGES
    earlier = gl.where(later, read - 1, read) % STAGES  # in a row's first step, zeros times its own keys
    mbarrier.wait(k_full.index(stage), (read // STAGES) & 1)
    s_token = warpgroup_mma(
        q.index(PART).reshape([64, D]), k.index(stage).reshape([64, D]).permute((1, 0)), zero, use_acc=False,
        is_async=True,
    )  # fmt: skip
    mbarrier.wait(v_full.index(stage), (read // STAGES) & 1)
    dp_token = warpgroup_mma(
        do.index(PART).reshape([64, D]), v.index(stage).reshape([64, D]).permute((1, 0)), zero, use_acc=False,
        is_async=True,
    )  # fmt: skip
    dq_token = warpgroup_mma(unpack_pairs(ds, 64, LEFT, DTYPE), k.index(earlier).reshape([64, D]), dq, is_async=True)
    s = warpgroup_mma_wait(2, deps=(s_token,))
    if MASKED:
        s = masked(s, words, 2)
    p = gl.exp2(s * log2_scale - gl.expand_dims(lse, 1))
    dp = warpgroup_mma_wait(1, deps=(dp_token,))
    mbarrier.arrive(v_empty.index(stage), count=1)
    ds = pack_pairs(p * (dp - gl.expand_dims(delta, 1)), 64, DTYPE)
    # This wait passes at once. It keeps the assembler from moving the wait for dQ above the arithmetic.
    mbarrier.wait(unused.index(0), 1)
    dq = warpgroup_mma_wait(0, deps=(dq_token,))
    mbarrier.arrive(k_empty.index(earlier), count=1, pred=later)
    return dq, ds


@gluon.jit
def _consumer(
    signals, shared, descriptors, lists, sizes, PART: gl.constexpr, GROUP: gl.constexpr, STAGES: gl.constexpr,
    D: gl.constexpr, HAS_GRAD_LSE: gl.constexpr,
):  # fmt: skip
    q_full, q_empty, k_full, k_empty, v_full, v_empty, unused, out_full, out_empty = signals
    q, do, k, v, dq_out, out = shared
    q_desc, do_desc, k_desc, v_desc, dq_desc, out_desc = descriptors
    row_stats, row_lse, row_grad_lse, items, blocks, tiles, masks = lists
    count, queries, padded, heads, log2_scale, scale = sizes
    DTYPE: gl.constexpr = q_desc.dtype
    LEFT: gl.constexpr = gl.DotOperandLayout(0, accumulator(D), 2)
    ROWS: gl.constexpr = gl.SliceLayout(1, accumulator(64))
    read = 0
    for round_ in range(0, rounds_of_program(count)):
        index = item_of_round(round_, count)
        batch, kv_head, row, first, tiles_of_row, partial, _ = load_item(items, index // GROUP)
        head = kv_head * GROUP + index % GROUP
        query = row * 128 + PART * 64
        offset = gl.arange(0, 64, layout=ROWS)
        at = row_stats + (batch * heads + head).to(gl.int64) * 2 * padded + query + offset
        source = (batch * heads + head).to(gl.int64) * queries + query
        inside = query + offset < queries
        lse = gl.load(row_lse + source + offset, mask=inside, other=float("-inf"))
        if HAS_GRAD_LSE:
            delta = -gl.load(row_grad_lse + source + offset, mask=inside, other=0.0)
        else:
            delta = gl.zeros([64], gl.float32, ROWS)
        dq = gl.zeros([64, D], gl.float32, accumulator(D))
        ds = pack_pairs(gl.zeros([64, 64], gl.float32, accumulator(64)), 64, DTYPE)
        mbarrier.wait(out_full.index(PART), round_ & 1)
        mbarrier.wait(q_full.index(PART), round_ & 1)
        products = out.index(PART).reshape([64, D]).load(LEFT).to(gl.float32)
        products *= do.index(PART).reshape([64, D]).load(LEFT).to(gl.float32)
        delta += gl.convert_layout(gl.sum(products, 1), ROWS, assert_trivial=True)
        mbarrier.arrive(out_empty.index(PART), count=1)
        seen = lse != float("-inf")
        delta = gl.where(seen, delta, 0.0)
        lse = gl.where(seen, lse * 1.4426950408889634, float("inf"))  # +inf: p = 0 without a mask
        gl.store(at, lse)
        gl.store(at + padded, delta)
        tile = gl.load(tiles + first, mask=partial > 0, other=0)
        for step in range(0, partial * 2):
            words = load_words(masks, tile, PART * 64, step % 2 * 2, 2)
            tile = gl.load(tiles + first + gl.minimum(step + 1, partial * 2 - 1) // 2)
            dq, ds = _step(
                signals, shared, log2_scale, read, step > 0, words, ds, dq, lse, delta, PART, STAGES, D, DTYPE, True
            )
            read += 1
        for step in range(partial * 2, tiles_of_row * 2):
            dq, ds = _step(
                signals, shared, log2_scale, read, step > 0, 0, ds, dq, lse, delta, PART, STAGES, D, DTYPE, False
            )
            read += 1
        mbarrier.arrive(q_empty.index(PART), count=1)
        some = tiles_of_row > 0
        last = gl.maximum(read - 1, 0) % STAGES
        dq_token = warpgroup_mma(unpack_pairs(ds, 64, LEFT, DTYPE), k.index(last).reshape([64, D]), dq, is_async=True)
        dq = warpgroup_mma_wait(0, deps=(dq_token,))
        mbarrier.arrive(k_empty.index(last), count=1, pred=some)
        tma.store_wait(0)
        dq_out.index(PART).reshape([64, D]).store(gl.where(some, dq * scale, 0.0).to(DTYPE))
        fence_async_shared()
        synchronize()
        tma.async_copy_shared_to_global(dq_desc, [batch, head, query, 0], dq_out.index(PART))
    tma.store_wait(0)

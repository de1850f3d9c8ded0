"""dK and dV by columns: a producer warp and two consumers of 64 keys, which walk a column of tiles in steps of 64
queries, once per query head of the group.

The products are transposed, S^T = K Q^T and dP^T = V dO^T, so that P^T and dS^T stay in registers as left operands of
dV += P^T dO and dK += dS^T Q. Letters as in kernels/backends/triton/dense/backward.py.
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
    describe_row_stats,
    item_of_round,
    load_item,
    load_words,
    masked,
    processors,
    rounds_of_program,
    synchronize,
)
from kernels.backends.triton.common import LOG2_E
from kernels.backends.triton.dense.backward_keys import sum_chunks
from kernels.backends.triton.dense.work import plan_of
from kernels.layout.block_layout import BlockLayout

STAGES = 3
"""Buffers of 64 queries and their output gradients."""


def grad_keys(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, row_stats: Tensor, layout: BlockLayout, scale: float
) -> tuple[Tensor, Tensor]:
    """(dk, dv); tensors are `addressable`, row_stats as in kernels/backends/triton/dense/backward.py."""
    heads, kv_heads, head_dim = q.shape[1], k.shape[1], q.shape[-1]
    plan = plan_of(layout)
    work = plan.columns(len(q), kv_heads)
    dk, dv = torch.empty_like(k), torch.empty_like(v)
    sums = torch.empty(max(work.buffers, 1), 2, 128, head_dim, dtype=torch.float32, device=q.device)
    _grad_keys[(min(len(work.items), processors(q.device)),)](
        describe(q, 64),
        describe(grad_out, 64),
        describe(k, 64),
        describe(v, 64),
        describe(dk, 64),
        describe(dv, 64),
        describe_row_stats(row_stats, 64),
        sums,
        work.items,
        layout.columns.blocks,
        layout.columns.tiles,
        plan.transposed_masks,
        len(work.items),
        heads,
        scale * LOG2_E,
        scale,
        GROUP=heads // kv_heads,
        STAGES=STAGES,
        D=head_dim,
        SPLIT=work.buffers > 0,
        num_warps=4,
    )
    if work.buffers:
        sum_chunks(sums, work, dk, dv, scale, layout)
    return dk, dv


@gluon.jit(do_not_specialize=["count", "heads"])
def _grad_keys(
    q_desc,
    do_desc,
    k_desc,
    v_desc,
    dk_desc,
    dv_desc,
    stats_desc,
    sums,
    items,
    blocks,
    tiles,
    masks,
    count,
    heads,
    log2_scale,
    scale,
    GROUP: gl.constexpr,
    STAGES: gl.constexpr,
    D: gl.constexpr,
    SPLIT: gl.constexpr,
):
    DTYPE: gl.constexpr = q_desc.dtype
    k = gl.allocate_shared_memory(DTYPE, [2, 1, 1, 64, D], k_desc.layout)
    v = gl.allocate_shared_memory(DTYPE, [2, 1, 1, 64, D], v_desc.layout)
    q = gl.allocate_shared_memory(DTYPE, [STAGES, 1, 1, 64, D], q_desc.layout)
    do = gl.allocate_shared_memory(DTYPE, [STAGES, 1, 1, 64, D], do_desc.layout)
    out = gl.allocate_shared_memory(DTYPE, [4, 1, 1, 64, D], dk_desc.layout)  # dK and dV of both consumers
    stats = gl.allocate_shared_memory(gl.float32, [STAGES, 2, 64], stats_desc.layout)
    kv_full, kv_empty = barriers(2, 1), barriers(2, 1)
    full, empty = barriers(STAGES, 1), barriers(STAGES, 2)
    fence_async_shared()
    signals = (kv_full, kv_empty, full, empty)
    shared = (k, v, q, do, out, stats)
    descriptors = (q_desc, do_desc, k_desc, v_desc, dk_desc, dv_desc, stats_desc)
    lists = (sums, items, blocks, tiles, masks)
    sizes = (count, heads, log2_scale, scale)
    gl.warp_specialize(
        [
            (_consumer, (signals, shared, descriptors, lists, sizes, 0, GROUP, STAGES, D, SPLIT)),
            (_consumer, (signals, shared, descriptors, lists, sizes, 1, GROUP, STAGES, D, SPLIT)),
            (_producer, (signals, shared, descriptors, lists, sizes, GROUP, STAGES, D, SPLIT)),
        ],
        [4, 1],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )


@gluon.jit
def _producer(
    signals, shared, descriptors, lists, sizes, GROUP: gl.constexpr, STAGES: gl.constexpr, D: gl.constexpr,
    SPLIT: gl.constexpr,
):  # fmt: skip
    kv_full, kv_empty, full, empty = signals
    k, v, q, do, out, stats = shared
    q_desc, do_desc, k_desc, v_desc, dk_desc, dv_desc, stats_desc = descriptors
    sums, items, blocks, tiles, masks = lists
    count, heads, log2_scale, scale = sizes
    read = 0  # steps, over all columns
    for round_ in range(0, rounds_of_program(count)):
        index = item_of_round(round_, count)
        batch, kv_head, column, first, tiles_of_column, _, _ = load_item(items, index)
        for part in gl.static_range(2):
            key = column * 128 + part * 64
            mbarrier.wait(kv_empty.index(part), (round_ & 1) ^ 1)
            mbarrier.expect(kv_full.index(part), 2 * 64 * D * 2)
            tma.async_copy_global_to_shared(k_desc, [batch, kv_head, key, 0], kv_full.index(part), k.index(part))
            tma.async_copy_global_to_shared(v_desc, [batch, kv_head, key, 0], kv_full.index(part), v.index(part))
        for head_in_group in range(GROUP):
            head = kv_head * GROUP + head_in_group
            for step in range(0, tiles_of_column * 2):
                query = gl.load(blocks + first + step // 2) * 128 + step % 2 * 64
                stage = read % STAGES
                mbarrier.wait(empty.index(stage), ((read // STAGES) & 1) ^ 1)
                mbarrier.expect(full.index(stage), 2 * 64 * D * 2 + 2 * 64 * 4)
                tma.async_copy_global_to_shared(q_desc, [batch, head, query, 0], full.index(stage), q.index(stage))
                tma.async_copy_global_to_shared(do_desc, [batch, head, query, 0], full.index(stage), do.index(stage))
                tma.async_copy_global_to_shared(
                    stats_desc, [(batch * heads + head) * 2, query], full.index(stage), stats.index(stage)
                )
                read += 1


@gluon.jit
def _step(
    signals, shared, log2_scale, read, more, words, s, dk, dv, PART: gl.constexpr, STAGES: gl.constexpr,
    D: gl.constexpr, DTYPE: gl.constexpr, MASKED: gl.constexpr,
):  # fmt: skip
    """(s of the next step, dk, dv) after 64 queries. s: this step's scores. more: whether a next step follows."""
    kv_full, kv_empty, full, empty = signals
    k, v, q, do, out, stats = shared
    LEFT: gl.constexpr = gl.DotOperandLayout(0, accumulator(D), 2)
    QUERIES: gl.constexpr = gl.SliceLayout(0, accumulator(64))
    by_row = stats._reinterpret(gl.float32, [STAGES * 2, 64], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    zero = gl.zeros([64, 64], gl.float32, accumulator(64))
    stage = read % STAGES
    next_stage = (read + 1) % STAGES
    dp_token = warpgroup_mma(
        v.index(PART).reshape([64, D]), do.index(stage).reshape([64, D]).permute((1, 0)), zero, use_acc=False,
        is_async=True,
    )  # fmt: skip
    lse = by_row.index(2 * stage).load(QUERIES)
    if MASKED:
        s = masked(s, words, 2)
    p = gl.exp2(s * log2_scale - gl.expand_dims(lse, 0))
    delta = by_row.index(2 * stage + 1).load(QUERIES)
    dp = warpgroup_mma_wait(0, deps=(dp_token,))
    dv_token = warpgroup_mma(
        gl.convert_layout(p.to(DTYPE), LEFT, assert_trivial=True), do.index(stage).reshape([64, D]), dv, is_async=True
    )
    ds = (p * (dp - gl.expand_dims(delta, 0))).to(DTYPE)
    dk_token = warpgroup_mma(
        gl.convert_layout(ds, LEFT, assert_trivial=True), q.index(stage).reshape([64, D]), dk, is_async=True
    )
    # The next scores are issued and awaited here: an accumulator in flight over a loop's end makes the assembler
    # serialize all products.
    mbarrier.wait(full.index(next_stage), ((read + 1) // STAGES) & 1, pred=more)
    s_token = warpgroup_mma(
        k.index(PART).reshape([64, D]), q.index(next_stage).reshape([64, D]).permute((1, 0)), zero, use_acc=False,
        is_async=True,
    )  # fmt: skip
    dv, dk = warpgroup_mma_wait(1, deps=(dv_token, dk_token))
    mbarrier.arrive(empty.index(stage), count=1)
    return warpgroup_mma_wait(0, deps=(s_token,)), dk, dv


@gluon.jit
def _consumer(
    signals, shared, descriptors, lists, sizes, PART: gl.constexpr, GROUP: gl.constexpr, STAGES: gl.constexpr,
    D: gl.constexpr, SPLIT: gl.constexpr,
):  # fmt: skip
    kv_full, kv_empty, full, empty = signals
    k, v, q, do, out, stats = shared
    q_desc, do_desc, k_desc, v_desc, dk_desc, dv_desc, stats_desc = descriptors
    sums, items, blocks, tiles, masks = lists
    count, heads, log2_scale, scale = sizes
    DTYPE: gl.constexpr = q_desc.dtype
    read = 0
    for round_ in range(0, rounds_of_program(count)):
        index = item_of_round(round_, count)
        batch, kv_head, column, first, tiles_of_column, partial, buffer = load_item(items, index)
        dk = gl.zeros([64, D], gl.float32, accumulator(D))
        dv = gl.zeros([64, D], gl.float32, accumulator(D))
        end = read + tiles_of_column * 2 * GROUP
        mbarrier.wait(kv_full.index(PART), round_ & 1)
        mbarrier.wait(full.index(read % STAGES), (read // STAGES) & 1, pred=tiles_of_column > 0)
        zero = gl.zeros([64, 64], gl.float32, accumulator(64))
        s_token = warpgroup_mma(
            k.index(PART).reshape([64, D]), q.index(read % STAGES).reshape([64, D]).permute((1, 0)), zero,
            use_acc=False, is_async=True,
        )  # fmt: skip
        s = warpgroup_mma_wait(0, deps=(s_token,))
        for _ in range(GROUP):
            tile = gl.load(tiles + first, mask=partial > 0, other=0)
            for step in range(0, partial * 2):
                words = load_words(masks, tile, PART * 64, step % 2 * 2, 2)
                tile = gl.load(tiles + first + gl.minimum(step + 1, partial * 2 - 1) // 2)
                s, dk, dv = _step(
                    signals, shared, log2_scale, read, read + 1 < end, words, s, dk, dv, PART, STAGES, D, DTYPE, True
                )
                read += 1
            for _ in range(partial * 2, tiles_of_column * 2):
                s, dk, dv = _step(
                    signals, shared, log2_scale, read, read + 1 < end, 0, s, dk, dv, PART, STAGES, D, DTYPE, False
                )
                read += 1
        mbarrier.arrive(kv_empty.index(PART), count=1)
        if buffer == -1:
            key = column * 128 + PART * 64
            tma.store_wait(0)
            out.index(PART).reshape([64, D]).store((dk * scale).to(DTYPE))
            out.index(2 + PART).reshape([64, D]).store(dv.to(DTYPE))
            fence_async_shared()
            synchronize()
            tma.async_copy_shared_to_global(dk_desc, [batch, kv_head, key, 0], out.index(PART))
            tma.async_copy_shared_to_global(dv_desc, [batch, kv_head, key, 0], out.index(2 + PART))
        if SPLIT:  # noqa: SIM102 - a constant and a number
            if buffer >= 0:
                row = PART * 64 + gl.arange(0, 64, layout=gl.SliceLayout(1, accumulator(D)))
                at = sums + buffer.to(gl.int64) * (2 * 128 * D)
                at += gl.expand_dims(row * D, 1)
                at += gl.expand_dims(gl.arange(0, D, layout=gl.SliceLayout(0, accumulator(D))), 0)
                gl.store(at, dk)
                gl.store(at + 128 * D, dv)
    tma.store_wait(0)

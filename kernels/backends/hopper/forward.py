"""Forward: persistent programs with one warp that loads and two warpgroups of 64 queries that compute.

A program takes rows of tiles (a block of 128 queries of one head) in turn. Its producer warp reads Q, K and V by TMA
into rings of buffers; each consumer keeps 64 rows of FlashAttention's online softmax in registers. Each step issues
Q K^T of its tile and P V of the tile before it, so that the tensor cores are busy during the softmax. The consumers
issue their products in turn, so that one computes its softmax while the other's products run.

Letters: s scores, p weights, m running maximum of s, l running sum of p (by thread, reduced at the end of the row).
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
    unpack_pairs,
)
from kernels.backends.triton.common import LOG2_E, addressable, positive_scale
from kernels.backends.triton.dense.work import plan_of
from kernels.layout.block_layout import BlockLayout

STAGES = 2
"""Buffers of Q, of K and of V."""


def forward(q: Tensor, k: Tensor, v: Tensor, layout: BlockLayout, scale: float) -> tuple[Tensor, Tensor]:
    """(out, lse), see kernels/backends/__init__.py; lse is float32."""
    q, scale = positive_scale(q, scale)
    q, k, v = addressable(q), addressable(k), addressable(v)
    batch, heads, queries, head_dim = q.shape
    # With q's strides: transposed to the model's [batch, tokens, heads, head_dim], it needs no copy.
    out = torch.empty_like(q)
    lse = torch.empty(batch, heads, queries, dtype=torch.float32, device=q.device)
    items = plan_of(layout).rows(batch, k.shape[1]).items
    group = heads // k.shape[1]
    count = len(items) * group
    _forward[(min(count, processors(q.device)),)](
        describe(q, 64),
        describe(k, 128),
        describe(v, 128),
        describe(out, 64),
        lse,
        items,
        layout.rows.blocks,
        layout.rows.tiles,
        layout.masks,
        count,
        queries,
        heads,
        scale * LOG2_E,
        GROUP=group,
        STAGES=STAGES,
        D=head_dim,
        num_warps=4,
    )
    return out, lse


@gluon.jit(do_not_specialize=["count", "queries", "heads"])
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
    count,
    queries,
    heads,
    scale,
    GROUP: gl.constexpr,
    STAGES: gl.constexpr,
    D: gl.constexpr,
):
    DTYPE: gl.constexpr = q_desc.dtype
    q = gl.allocate_shared_memory(DTYPE, [2 * STAGES, 1, 1, 64, D], q_desc.layout)  # of both consumers in turn
    k = gl.allocate_shared_memory(DTYPE, [STAGES, 1, 1, 128, D], k_desc.layout)
    v = gl.allocate_shared_memory(DTYPE, [STAGES, 1, 1, 128, D], v_desc.layout)
    out = gl.allocate_shared_memory(DTYPE, [2, 1, 1, 64, D], out_desc.layout)
    q_full, q_empty = barriers(2 * STAGES, 1), barriers(2 * STAGES, 1)
    k_full, k_empty = barriers(STAGES, 1), barriers(STAGES, 2)
    v_full, v_empty = barriers(STAGES, 1), barriers(STAGES, 2)
    turn = barriers(2, 1)
    fence_async_shared()
    mbarrier.arrive(turn.index(0), count=1)
    signals = (q_full, q_empty, k_full, k_empty, v_full, v_empty, turn)
    shared = (q, k, v, out)
    descriptors = (q_desc, k_desc, v_desc, out_desc)
    lists = (items, blocks, tiles, masks, lse)
    sizes = (count, queries, heads, scale)
    gl.warp_specialize(
        [
            (_consumer, (signals, shared, descriptors, lists, sizes, 0, GROUP, STAGES, D)),
            (_consumer, (signals, shared, descriptors, lists, sizes, 1, GROUP, STAGES, D)),
            (_producer, (signals, shared, descriptors, lists, sizes, GROUP, STAGES, D)),
        ],
        [4, 1],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )


@gluon.jit
def _producer(signals, shared, descriptors, lists, sizes, GROUP: gl.constexpr, STAGES: gl.constexpr, D: gl.constexpr):
    q_full, q_empty, k_full, k_empty, v_full, v_empty, turn = signals
    q, k, v, out = shared
    q_desc, k_desc, v_desc, out_desc = descriptors
    items, blocks, tiles, masks, lse = lists
    count, queries, heads, scale = sizes
    read = 0  # tiles, over all rows
    for round_ in range(0, rounds_of_program(count)):
        index = item_of_round(round_, count)
        batch, kv_head, row, first, tiles_of_row, _, _ = load_item(items, index // GROUP)
        head = kv_head * GROUP + index % GROUP
        for part in gl.static_range(2):
            buffer = round_ % STAGES * 2 + part
            mbarrier.wait(q_empty.index(buffer), ((round_ // STAGES) & 1) ^ 1)
            mbarrier.expect(q_full.index(buffer), 64 * D * 2)
            tma.async_copy_global_to_shared(
                q_desc, [batch, head, row * 128 + part * 64, 0], q_full.index(buffer), q.index(buffer)
            )
        # An empty row reads the first block of keys and hides it. V comes a tile after K, as it is needed.
        key = gl.load(blocks + first, mask=tiles_of_row > 0, other=0) * 128
        stage = read % STAGES
        mbarrier.wait(k_empty.index(stage), ((read // STAGES) & 1) ^ 1)
        mbarrier.expect(k_full.index(stage), 128 * D * 2)
        tma.async_copy_global_to_shared(k_desc, [batch, kv_head, key, 0], k_full.index(stage), k.index(stage))
        for i in range(1, tiles_of_row):
            next_key = gl.load(blocks + first + i) * 128
            v_stage = read % STAGES
            v_phase = ((read // STAGES) & 1) ^ 1
            read += 1
            stage = read % STAGES
            mbarrier.wait(k_empty.index(stage), ((read // STAGES) & 1) ^ 1)
            mbarrier.expect(k_full.index(stage), 128 * D * 2)
            tma.async_copy_global_to_shared(k_desc, [batch, kv_head, next_key, 0], k_full.index(stage), k.index(stage))
            mbarrier.wait(v_empty.index(v_stage), v_phase)
            mbarrier.expect(v_full.index(v_stage), 128 * D * 2)
            tma.async_copy_global_to_shared(v_desc, [batch, kv_head, key, 0], v_full.index(v_stage), v.index(v_stage))
            key = next_key
        stage = read % STAGES
        mbarrier.wait(v_empty.index(stage), ((read // STAGES) & 1) ^ 1)
        mbarrier.expect(v_full.index(stage), 128 * D * 2)
        tma.async_copy_global_to_shared(v_desc, [batch, kv_head, key, 0], v_full.index(stage), v.index(stage))
        read += 1


@gluon.jit
def _softmax(s, m, l, scale, MASKED: gl.constexpr, DTYPE: gl.constexpr):  # noqa: E741
    """(p packed, m, l, factor of the earlier sums)."""
    SUMS: gl.constexpr = _sums_layout()
    highest = gl.maximum(m, gl.max(s, 1))
    finite = highest
    if MASKED:  # in a row without visible keys so far, any finite maximum gives p = 0
        finite = gl.where(highest == float("-inf"), 0.0, highest)
    scaled = finite * scale
    alpha = gl.exp2(m * scale - scaled)
    p = gl.exp2(s * scale - gl.expand_dims(scaled, 1))
    sums = gl.sum(gl.sum(gl.reshape(p, [64, 16, 4, 2]), 3), 1)
    sums = gl.convert_layout(sums, SUMS, assert_trivial=True)
    factor = gl.convert_layout(alpha, gl.SliceLayout(1, SUMS), assert_trivial=True)
    return pack_pairs(p, 128, DTYPE), highest, l * gl.expand_dims(factor, 1) + sums, alpha


@gluon.constexpr_function
def _sums_layout():
    """The layout of each thread's sums of its rows, `[64, 4]`: 4 threads share a row of the accumulator."""
    return gl.DistributedLinearLayout(
        reg_bases=[[8, 0]],
        lane_bases=[[0, 1], [0, 2], [1, 0], [2, 0], [4, 0]],
        warp_bases=[[16, 0], [32, 0]],
        block_bases=[],
        shape=[64, 4],
    )


@gluon.jit
def _step(
    signals, shared, own_q, read, issued, more, words, p, m, l, acc, scale, PART: gl.constexpr, STAGES: gl.constexpr,  # noqa: E741
    D: gl.constexpr, DTYPE: gl.constexpr, MASKED: gl.constexpr,
):  # fmt: skip
    """One tile after a row's first: its scores and weights, and the product of the earlier weights with V."""
    q_full, q_empty, k_full, k_empty, v_full, v_empty, turn = signals
    q, k, v, out = shared
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(0, accumulator(D), 2)
    zero = gl.zeros([64, 128], gl.float32, accumulator(128))
    stage = read % STAGES
    v_stage = (read - 1) % STAGES
    mbarrier.wait(turn.index(PART), issued & 1)
    s_token = warpgroup_mma(
        own_q, k.index(stage).reshape([128, D]).permute((1, 0)), zero, use_acc=False,
        is_async=True,
    )  # fmt: skip
    mbarrier.wait(v_full.index(v_stage), ((read - 1) // STAGES) & 1)
    acc_token = warpgroup_mma(
        unpack_pairs(p, 128, WEIGHTS, DTYPE), v.index(v_stage).reshape([128, D]), acc, is_async=True
    )
    mbarrier.arrive(turn.index(1 - PART), count=1)
    s = warpgroup_mma_wait(1, deps=(s_token,))
    mbarrier.arrive(k_empty.index(stage), count=1)
    if MASKED:
        s = masked(s, words, 4)
    p, m, l, alpha = _softmax(s, m, l, scale, MASKED, DTYPE)  # noqa: E741
    # The wait for the next K stands here to keep the assembler from moving the wait for P V above the softmax.
    mbarrier.wait(k_full.index((read + 1) % STAGES), ((read + 1) // STAGES) & 1, pred=more)
    acc = warpgroup_mma_wait(0, deps=(acc_token,))
    mbarrier.arrive(v_empty.index(v_stage), count=1)
    return p, m, l, acc * gl.expand_dims(gl.convert_layout(alpha, gl.SliceLayout(1, accumulator(D))), 1)


@gluon.jit
def _consumer(
    signals, shared, descriptors, lists, sizes, PART: gl.constexpr, GROUP: gl.constexpr, STAGES: gl.constexpr,
    D: gl.constexpr,
):  # fmt: skip
    q_full, q_empty, k_full, k_empty, v_full, v_empty, turn = signals
    q, k, v, out = shared
    q_desc, k_desc, v_desc, out_desc = descriptors
    items, blocks, tiles, masks, lse = lists
    count, queries, heads, scale = sizes
    DTYPE: gl.constexpr = q_desc.dtype
    ROWS: gl.constexpr = gl.SliceLayout(1, accumulator(128))
    OUT_ROWS: gl.constexpr = gl.SliceLayout(1, accumulator(D))
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(0, accumulator(D), 2)
    read = 0  # tiles, over all rows
    issued = 0  # turns to issue products
    next_batch, next_kv_head, next_row, next_first, next_listed, next_partial, _buffer = load_item(
        items, item_of_round(0, count) // GROUP
    )
    for round_ in range(0, rounds_of_program(count)):
        batch, kv_head, first, listed, partial = next_batch, next_kv_head, next_first, next_listed, next_partial
        query = next_row * 128 + PART * 64
        index = item_of_round(round_, count)
        # The next item is read a row early.
        next_batch, next_kv_head, next_row, next_first, next_listed, next_partial, _buffer = load_item(
            items, item_of_round(round_ + 1, count) // GROUP
        )
        head = kv_head * GROUP + index % GROUP
        tiles_of_row = gl.maximum(listed, 1)
        m = gl.full([64], float("-inf"), gl.float32, ROWS)
        l = gl.zeros([64, 4], gl.float32, _sums_layout())  # noqa: E741
        acc = gl.zeros([64, D], gl.float32, accumulator(D))
        # Words of the next masked tile are read a step early.
        tile = gl.load(tiles + first, mask=partial > 0, other=0)
        words = load_words(masks, tile, PART * 64, 0, 4)
        tile = gl.load(tiles + first + 1, mask=partial > 1, other=0)
        words = gl.where(listed > 0, words, 0)

        buffer = round_ % STAGES * 2 + PART
        own_q = q.index(buffer).reshape([64, D])
        mbarrier.wait(q_full.index(buffer), (round_ // STAGES) & 1)
        stage = read % STAGES
        mbarrier.wait(k_full.index(stage), (read // STAGES) & 1)
        zero = gl.zeros([64, 128], gl.float32, accumulator(128))
        s_token = warpgroup_mma(
            own_q, k.index(stage).reshape([128, D]).permute((1, 0)), zero, use_acc=False,
            is_async=True,
        )  # fmt: skip
        s = warpgroup_mma_wait(0, deps=(s_token,))
        mbarrier.arrive(k_empty.index(stage), count=1)
        if (partial > 0) | (listed == 0):
            s = masked(s, words, 4)
        p, m, l, _ = _softmax(s, m, l, scale, True, DTYPE)  # noqa: E741
        read += 1
        mbarrier.wait(k_full.index(read % STAGES), (read // STAGES) & 1, pred=tiles_of_row > 1)
        for i in range(1, partial):
            words = load_words(masks, tile, PART * 64, 0, 4)
            tile = gl.load(tiles + first + gl.minimum(i + 1, partial - 1))
            p, m, l, acc = _step(  # noqa: E741
                signals, shared, own_q, read, issued, i + 1 < tiles_of_row, words, p, m, l, acc, scale, PART, STAGES,
                D, DTYPE, True,
            )  # fmt: skip
            read += 1
            issued += 1
        for i in range(gl.maximum(partial, 1), tiles_of_row):
            p, m, l, acc = _step(  # noqa: E741
                signals, shared, own_q, read, issued, i + 1 < tiles_of_row, words, p, m, l, acc, scale, PART, STAGES,
                D, DTYPE, False,
            )  # fmt: skip
            read += 1
            issued += 1
        mbarrier.arrive(q_empty.index(buffer), count=1)

        stage = (read - 1) % STAGES
        mbarrier.wait(v_full.index(stage), ((read - 1) // STAGES) & 1)
        acc_token = warpgroup_mma(
            unpack_pairs(p, 128, WEIGHTS, DTYPE), v.index(stage).reshape([128, D]), acc, is_async=True
        )
        total = gl.convert_layout(gl.sum(l, 1), ROWS)
        seen = total != 0  # True for NaN, too
        row = query + gl.arange(0, 64, layout=ROWS)
        value = gl.where(seen, (m * scale + gl.log2(gl.where(seen, total, 1.0))) * 0.6931471805599453, float("-inf"))
        gl.store(lse + (batch * heads + head).to(gl.int64) * queries + row, value, mask=row < queries)
        factor = gl.convert_layout(gl.where(seen, 1.0 / gl.where(seen, total, 1.0), 0.0), OUT_ROWS)
        acc = warpgroup_mma_wait(0, deps=(acc_token,))
        mbarrier.arrive(v_empty.index(stage), count=1)
        factor = gl.expand_dims(factor, 1)
        result = gl.where(factor == 0, 0.0, acc * factor).to(DTYPE)
        tma.store_wait(0)
        out.index(PART).reshape([64, D]).store(result)
        fence_async_shared()
        tma.async_copy_shared_to_global(out_desc, [batch, head, query, 0], out.index(PART))
    tma.store_wait(0)

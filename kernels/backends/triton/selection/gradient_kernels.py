"""Triton kernels of the backward pass by key block: dK, dV and partial dQ of a block, and the sums of cut lists.

Letters: s scores, p weights, dp gradient of p, ds gradient of s; a trailing t: transposed `[keys, rows]`.
"""

import triton
import triton.language as tl

from kernels.backends.triton.selection.work_items import SELECTED_ITEM, entry_and_head

COUNTS = [
    *("queries", "keys", "blocks", "lines", "selectors", "selectors_a_kv_head", "heads"),
    *("first_query", "piece"),
]


@triton.jit(do_not_specialize=COUNTS)
def block_gradients(
    q,
    k,
    v,
    do,
    rows_of,
    items,
    entries,
    document_start,
    partial_dq,
    places,
    grads,
    sums,
    q_batch,
    q_head,
    q_step,
    k_batch,
    k_head,
    k_step,
    v_batch,
    v_head,
    v_step,
    do_batch,
    do_head,
    do_step,
    log2_scale,
    queries,
    keys,
    blocks,
    lines,
    selectors,
    selectors_a_kv_head,
    heads,
    first_query,
    piece,
    SLOTS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    D: tl.constexpr,
    M: tl.constexpr,
    BULK: tl.constexpr,
    TURNED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # dK and dQ are left without the factor `scale`.
    item = items + tl.program_id(0) * SELECTED_ITEM
    count = tl.load(item + 2)
    if count == 0:
        return
    list_index = tl.load(item)
    line = list_index // blocks
    block = list_index % blocks
    first_row = tl.load(item + 4)
    batch = (line // selectors).to(tl.int64)
    selector = line % selectors
    kv_head = (selector // selectors_a_kv_head).to(tl.int64)
    line = line.to(tl.int64)
    list_of = entries + line * queries * SLOTS + tl.load(item + 1)
    slot = tl.load(item + 3)
    # Of a block in which a document begins, those who choose it see that document's tokens alone.
    first = tl.load(document_start + batch * queries + tl.load(list_of) // SLOTS)

    column = tl.arange(0, D)
    within = (column < HEAD_DIM)[None, :]
    line_in_block = tl.arange(0, BLOCK)
    key = block * BLOCK + line_in_block
    inside = ((key < keys) & (key >= first))[:, None] & within  # a hidden key may hold NaN
    wide_key = key.to(tl.int64)[:, None]
    kb = tl.load(k + batch * k_batch + kv_head * k_head + wide_key * k_step + column[None, :], inside, 0.0)
    vb = tl.load(v + batch * v_batch + kv_head * v_head + wide_key * v_step + column[None, :], inside, 0.0)
    first_head = selector * GROUP
    q_base = q + batch * q_batch + first_head.to(tl.int64) * q_head
    do_base = do + batch * do_batch + first_head.to(tl.int64) * do_head
    rows_base = rows_of + (batch * queries * heads + first_head) * 2 + tl.arange(0, 2)[None, :]
    places += (line * piece - first_query) * SLOTS
    dk = tl.zeros([BLOCK, D], tl.float32)
    dv = tl.zeros([BLOCK, D], tl.float32)
    # Who comes next, and what a row needs of lse and delta, is read early: the first so that rows can be asked for
    # while a step computes, the others because few bytes in a pipeline's buffers cost as much as many.
    index, head = entry_and_head(0, M, GROUP)
    entry = tl.load(list_of + tl.minimum(index, count - 1))
    lse, delta = tl.split(tl.load(rows_base + ((entry // SLOTS) * heads + head)[:, None] * 2))
    lse = tl.where(index < count, lse, float("inf"))  # weights of 0 beyond the list
    index, head = entry_and_head(M, M, GROUP)
    ahead = tl.load(list_of + tl.minimum(index, count - 1))
    for start in tl.range(0, count * GROUP, M):
        index, head = entry_and_head(start, M, GROUP)
        live = index < count  # beyond the end the last entry again
        wide_query = (entry // SLOTS).to(tl.int64)
        wide_head = head.to(tl.int64)
        qb = tl.load(q_base + (wide_query * q_step + wide_head * q_head)[:, None] + column[None, :], within, 0.0)
        dob = tl.load(do_base + (wide_query * do_step + wide_head * do_head)[:, None] + column[None, :], within, 0.0)
        next_index, next_head = entry_and_head(start + M, M, GROUP)
        next_lse, next_delta = tl.split(tl.load(rows_base + ((ahead // SLOTS) * heads + next_head)[:, None] * 2))
        next_lse = tl.where(next_index < count, next_lse, float("inf"))
        # Read twice rather than handed from variable to variable: Triton pipelines no loop that does so.
        next_entry = tl.load(list_of + tl.minimum(next_index, count - 1))
        after, _ = entry_and_head(start + 2 * M, M, GROUP)
        next_ahead = tl.load(list_of + tl.minimum(after, count - 1))
        st = tl.dot(kb, qb.T, input_precision=PRECISION)
        if first > block * BLOCK:
            st = tl.where((key >= first)[:, None], st, float("-inf"))
        pt = tl.exp2(st * log2_scale - lse[None, :])
        dv = tl.dot(pt.to(dob.dtype), dob, dv, input_precision=PRECISION)
        dpt = tl.dot(vb, dob.T, input_precision=PRECISION)
        dst = (pt * (dpt - delta[None, :])).to(qb.dtype)
        dk = tl.dot(dst, qb, dk, input_precision=PRECISION)
        dq = tl.dot(kb.T, dst, input_precision=PRECISION).T if TURNED else tl.dot(dst.T, kb, input_precision=PRECISION)
        to = first_row + start + tl.arange(0, M)
        if BULK:
            partial_dq.store([first_row + start, 0], dq.to(q.dtype.element_ty))
        else:
            tl.store(
                partial_dq + to.to(tl.int64)[:, None] * HEAD_DIM + column[None, :],
                dq.to(q.dtype.element_ty),
                live[:, None] & within,
                eviction_policy="evict_first",  # read once, later: q's rows rather stay
            )
        tl.store(places + entry, to, live & (head == 0))
        entry = next_entry
        ahead = next_ahead
        lse = next_lse
        delta = next_delta

    dk = tl.where((key >= first)[:, None], dk, 0.0)  # a weight of 0 does not hide a NaN of dO
    dv = tl.where((key >= first)[:, None], dv, 0.0)
    offset = line_in_block[:, None] * HEAD_DIM + column[None, :]
    if slot >= 0:
        to_sum = sums + slot.to(tl.int64) * 2 * BLOCK * HEAD_DIM + offset
        tl.store(to_sum, dk, within)
        tl.store(to_sum + BLOCK * HEAD_DIM, dv, within)
    else:
        to_grad = grads + list_index.to(tl.int64) * BLOCK * HEAD_DIM + offset
        second = lines.to(tl.int64) * blocks * BLOCK * HEAD_DIM
        tl.store(to_grad, tl.load(to_grad, within, 0.0) + dk, within)
        tl.store(to_grad + second, tl.load(to_grad + second, within, 0.0) + dv, within)


@triton.jit(do_not_specialize=["lists"])
def add_cuts(
    sums,
    cuts,
    grads,
    lists,
    BLOCK: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    D: tl.constexpr,
    M: tl.constexpr,
):
    """dK and dV of the blocks whose list was cut: their items' sums, always in the same order."""
    count = tl.load(cuts + tl.program_id(0) * 2 + 1)
    if count == 0:
        return
    slot = tl.load(cuts + tl.program_id(0) * 2).to(tl.int64)
    column = tl.arange(0, D)
    within = (column < HEAD_DIM)[None, :]
    offset = (tl.program_id(1) * M + tl.arange(0, M))[:, None] * HEAD_DIM + column[None, :]
    to_k = grads + tl.program_id(0).to(tl.int64) * BLOCK * HEAD_DIM + offset
    to_v = to_k + lists.to(tl.int64) * BLOCK * HEAD_DIM
    sum_k = tl.load(to_k, within, 0.0)
    sum_v = tl.load(to_v, within, 0.0)
    at = sums + slot * 2 * BLOCK * HEAD_DIM + offset
    for _ in range(0, count):
        sum_k += tl.load(at, within, 0.0)
        sum_v += tl.load(at + BLOCK * HEAD_DIM, within, 0.0)
        at += 2 * BLOCK * HEAD_DIM
    tl.store(to_k, sum_k, within)
    tl.store(to_v, sum_v, within)

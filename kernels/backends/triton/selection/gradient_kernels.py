"""Triton kernels of the backward pass by key block: dK, dV and partial dQ of a block, and the sums over the items of
long lists.

Letters: s scores, p weights, dp gradient of p, ds gradient of s; a trailing t: transposed `[keys, rows]`.
"""

import triton
import triton.language as tl

from kernels.backends.triton.selection.work_items import ITEM_FIELDS, entry_and_head

NOT_SPECIALIZED = [
    *("queries", "keys", "blocks", "batch_selectors", "selectors", "selectors_per_kv_head", "heads"),
    *("first_query", "queries_per_chunk"),
]


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def block_gradients(
    q,
    k,
    v,
    do,
    row_stats,
    items,
    entries,
    document_start,
    partial_dq,
    first_rows,
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
    batch_selectors,
    selectors,
    selectors_per_kv_head,
    heads,
    first_query,
    queries_per_chunk,
    SLOTS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    D: tl.constexpr,
    M: tl.constexpr,
    TMA_STORE: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # dK and dQ do not include the factor `scale`.
    item = items + tl.program_id(0) * ITEM_FIELDS
    count = tl.load(item + 2)
    if count == 0:
        return
    list_index = tl.load(item)
    batch_selector = list_index // blocks
    block = list_index % blocks
    first_row = tl.load(item + 4)
    batch = (batch_selector // selectors).to(tl.int64)
    selector = batch_selector % selectors
    kv_head = (selector // selectors_per_kv_head).to(tl.int64)
    batch_selector = batch_selector.to(tl.int64)
    list_of = entries + batch_selector * queries * SLOTS + tl.load(item + 1)
    buffer = tl.load(item + 3)
    # If a document begins within the block, the queries that chose the block see only that document's tokens.
    first = tl.load(document_start + batch * queries + tl.load(list_of) // SLOTS)

    column = tl.arange(0, D)
    within = (column < HEAD_DIM)[None, :]
    row_in_block = tl.arange(0, BLOCK)
    key = block * BLOCK + row_in_block
    inside = ((key < keys) & (key >= first))[:, None] & within  # a hidden key may hold NaN
    wide_key = key.to(tl.int64)[:, None]
    kb = tl.load(k + batch * k_batch + kv_head * k_head + wide_key * k_step + column[None, :], inside, 0.0)
    vb = tl.load(v + batch * v_batch + kv_head * v_head + wide_key * v_step + column[None, :], inside, 0.0)
    first_head = selector * GROUP
    q_base = q + batch * q_batch + first_head.to(tl.int64) * q_head
    do_base = do + batch * do_batch + first_head.to(tl.int64) * do_head
    rows_base = row_stats + (batch * queries * heads + first_head) * 2 + tl.arange(0, 2)[None, :]
    first_rows += (batch_selector * queries_per_chunk - first_query) * SLOTS
    dk = tl.zeros([BLOCK, D], tl.float32)
    dv = tl.zeros([BLOCK, D], tl.float32)
    # The next entries are loaded early, so that their rows can be loaded while a step computes. So are their lse and
    # delta, because in a software pipeline small loads cost as much as large ones.
    index, head = entry_and_head(0, M, GROUP)
    entry = tl.load(list_of + tl.minimum(index, count - 1))
    lse, delta = tl.split(tl.load(rows_base + ((entry // SLOTS) * heads + head)[:, None] * 2))
    lse = tl.where(index < count, lse, float("inf"))  # weights of 0 after the end of the list
    index, head = entry_and_head(M, M, GROUP)
    ahead = tl.load(list_of + tl.minimum(index, count - 1))
    for start in tl.range(0, count * GROUP, M):
        index, head = entry_and_head(start, M, GROUP)
        live = index < count  # after the end, the last entry is repeated
        wide_query = (entry // SLOTS).to(tl.int64)
        wide_head = head.to(tl.int64)
        qb = tl.load(q_base + (wide_query * q_step + wide_head * q_head)[:, None] + column[None, :], within, 0.0)
        dob = tl.load(do_base + (wide_query * do_step + wide_head * do_head)[:, None] + column[None, :], within, 0.0)
        next_index, next_head = entry_and_head(start + M, M, GROUP)
        next_lse, next_delta = tl.split(tl.load(rows_base + ((ahead // SLOTS) * heads + next_head)[:, None] * 2))
        next_lse = tl.where(next_index < count, next_lse, float("inf"))
        # Loaded again, not copied from another variable, because Triton does not pipeline loops with such copies.
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
        dq = (
            tl.dot(kb.T, dst, input_precision=PRECISION).T
            if TRANSPOSED
            else tl.dot(dst.T, kb, input_precision=PRECISION)
        )
        to = first_row + start + tl.arange(0, M)
        if TMA_STORE:
            partial_dq.store([first_row + start, 0], dq.to(q.dtype.element_ty))
        else:
            tl.store(
                partial_dq + to.to(tl.int64)[:, None] * HEAD_DIM + column[None, :],
                dq.to(q.dtype.element_ty),
                live[:, None] & within,
                eviction_policy="evict_first",  # read only once, later: the cache should keep q
            )
        tl.store(first_rows + entry, to, live & (head == 0))
        entry = next_entry
        ahead = next_ahead
        lse = next_lse
        delta = next_delta

    dk = tl.where((key >= first)[:, None], dk, 0.0)  # a weight of 0 does not hide a NaN of dO
    dv = tl.where((key >= first)[:, None], dv, 0.0)
    offset = row_in_block[:, None] * HEAD_DIM + column[None, :]
    if buffer >= 0:
        to_sum = sums + buffer.to(tl.int64) * 2 * BLOCK * HEAD_DIM + offset
        tl.store(to_sum, dk, within)
        tl.store(to_sum + BLOCK * HEAD_DIM, dv, within)
    else:
        to_grad = grads + list_index.to(tl.int64) * BLOCK * HEAD_DIM + offset
        second = batch_selectors.to(tl.int64) * blocks * BLOCK * HEAD_DIM
        tl.store(to_grad, tl.load(to_grad, within, 0.0) + dk, within)
        tl.store(to_grad + second, tl.load(to_grad + second, within, 0.0) + dv, within)


@triton.jit(do_not_specialize=["lists"])
def sum_split_lists(
    sums,
    split_lists,
    grads,
    lists,
    BLOCK: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    D: tl.constexpr,
    M: tl.constexpr,
):
    """dK and dV of blocks with a split list: the sums of the list's items, always in the same order."""
    count = tl.load(split_lists + tl.program_id(0) * 2 + 1)
    if count == 0:
        return
    buffer = tl.load(split_lists + tl.program_id(0) * 2).to(tl.int64)
    column = tl.arange(0, D)
    within = (column < HEAD_DIM)[None, :]
    offset = (tl.program_id(1) * M + tl.arange(0, M))[:, None] * HEAD_DIM + column[None, :]
    to_k = grads + tl.program_id(0).to(tl.int64) * BLOCK * HEAD_DIM + offset
    to_v = to_k + lists.to(tl.int64) * BLOCK * HEAD_DIM
    sum_k = tl.load(to_k, within, 0.0)
    sum_v = tl.load(to_v, within, 0.0)
    at = sums + buffer * 2 * BLOCK * HEAD_DIM + offset
    for _ in range(0, count):
        sum_k += tl.load(at, within, 0.0)
        sum_v += tl.load(at + BLOCK * HEAD_DIM, within, 0.0)
        at += 2 * BLOCK * HEAD_DIM
    tl.store(to_k, sum_k, within)
    tl.store(to_v, sum_v, within)

"""The share of a query's softmax that each chosen block receives, by key block (see __init__.py): no values are
read."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.backends.triton.common import LOG2_E
from kernels.backends.triton.selection.launch_settings import choose
from kernels.backends.triton.selection.work_items import ITEM_FIELDS, SelectionPlan
from kernels.layout.selection import Selection


def block_mass(q: Tensor, k: Tensor, lse: Tensor, selection: Selection, plan: SelectionPlan, scale: float) -> Tensor:
    """float32 `[batch, selectors, queries, slots]`, see kernels.selection.selected_attention.block_mass."""
    batch, heads, queries, head_dim = q.shape
    selectors, slots = selection.selectors, selection.slots
    group = heads // selectors
    config = choose("mass", q.dtype, head_dim)
    padded = triton.next_power_of_2(group)
    entries = max(config.rows // padded, 1)
    mass = torch.zeros(batch, selectors, queries, slots, dtype=torch.float32, device=q.device)
    for chunk in range(plan.chunks):
        _block_mass[(plan.items.shape[1],)](
            q,
            k,
            lse.contiguous(),
            plan.items[chunk],
            selection.entries,
            selection.document_start,
            mass,
            *q.stride()[:3],
            *k.stride()[:3],
            scale * LOG2_E,
            queries,
            k.shape[2],
            selection.offsets.shape[2] - 1,
            selectors,
            selectors // k.shape[1],
            heads,
            SLOTS=slots,
            GROUP=group,
            PADDED=padded,
            BLOCK=selection.block,
            HEAD_DIM=head_dim,
            D=triton.next_power_of_2(head_dim),
            E=max(entries, triton.cdiv(16, padded)),
            PRECISION="ieee" if q.dtype == torch.float32 else "tf32",
            num_warps=config.warps,
            num_stages=config.stages,
            maxnreg=config.registers,
        )
    return mass


@triton.jit(do_not_specialize=["queries", "keys", "blocks", "selectors", "selectors_per_kv_head", "heads"])
def _block_mass(
    q,
    k,
    lse,
    items,
    entries,
    document_start,
    mass,
    q_batch,
    q_head,
    q_step,
    k_batch,
    k_head,
    k_step,
    log2_scale,
    queries,
    keys,
    blocks,
    selectors,
    selectors_per_kv_head,
    heads,
    SLOTS: tl.constexpr,
    GROUP: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    D: tl.constexpr,
    E: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """exp(scores - lse), summed over the block and averaged over the group. A row is an (entry, head)."""
    item = items + tl.program_id(0) * ITEM_FIELDS
    count = tl.load(item + 2)
    if count == 0:
        return
    M: tl.constexpr = E * PADDED
    batch_selector = tl.load(item) // blocks
    block = tl.load(item) % blocks
    batch = (batch_selector // selectors).to(tl.int64)
    selector = batch_selector % selectors
    kv_head = (selector // selectors_per_kv_head).to(tl.int64)
    batch_selector = batch_selector.to(tl.int64)
    list_of = entries + batch_selector * queries * SLOTS + tl.load(item + 1)
    column = tl.arange(0, D)
    key = block * BLOCK + tl.arange(0, BLOCK)
    kb = tl.load(
        k + batch * k_batch + kv_head * k_head + key.to(tl.int64)[:, None] * k_step + column[None, :],
        (key < keys)[:, None] & (column < HEAD_DIM)[None, :],
        0.0,
    )
    first_head = selector * GROUP
    q_base = q + batch * q_batch + first_head.to(tl.int64) * q_head
    for start in tl.range(0, count, E):
        row = tl.arange(0, M)
        index = start + row // PADDED
        head = row % PADDED
        live = (index < count) & (head < GROUP)
        entry = tl.load(list_of + index, live, 0)
        query = entry // SLOTS
        address = query.to(tl.int64) * q_step + head.to(tl.int64) * q_head
        qb = tl.load(q_base + address[:, None] + column[None, :], live[:, None] & (column < HEAD_DIM)[None, :], 0.0)
        s = tl.dot(qb, kb.T, input_precision=PRECISION) * log2_scale
        first = tl.load(document_start + batch * queries + query, live, 0)
        s = tl.where((key[None, :] >= first[:, None]) & live[:, None], s, float("-inf"))
        total = tl.load(lse + (batch * heads + first_head + head) * queries + query, live, 0.0) * 1.4426950408889634
        total = tl.where(total == float("-inf"), 0.0, total)
        shares = tl.sum(tl.exp2(s - total[:, None]), 1)
        means = tl.sum(tl.reshape(shares, [E, PADDED]), 1) / GROUP
        place = start + tl.arange(0, E)
        listed = tl.load(list_of + place, place < count, 0)
        tl.store(mass + batch_selector * queries * SLOTS + listed, means, place < count)

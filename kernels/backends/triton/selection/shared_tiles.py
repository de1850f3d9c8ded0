"""Forward pass on a Selection whose neighbouring queries choose alike: a tile of neighbours walks their blocks' union.

A tile is the (query, head) rows of a few neighbouring queries, as many as fill a matrix product (128 rows: 8 queries
of a group of 16 heads). Each block of the union carries a bit a query that chose it, and is loaded once for all; the
softmax is online, so nothing partial is written. What a tile computes in vain is 1 - slots / union: a gain over
`by_block` where the union is short. The result is the same whatever the choices are.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.backends.triton.common import LN_2, LOG2_E, describe
from kernels.backends.triton.selection.launch_settings import choose
from kernels.selection.selection import Selection

BITS = 32
"""Most queries a tile: a bit each in an int32."""


def forward(q: Tensor, k: Tensor, v: Tensor, selection: Selection, scale: float, config=None) -> tuple[Tensor, Tensor]:
    """(out, lse); scale > 0. `config` is for benchmarks."""
    batch, heads, queries, head_dim = q.shape
    selectors = selection.selectors
    group = heads // selectors
    config = config or choose("tiles", q.dtype, head_dim, group)
    neighbours = queries_a_tile(group, config.rows)
    columns = triton.next_power_of_2(head_dim)
    rows = max(16, triton.next_power_of_2(neighbours * group))
    blocks, bits, counts = unions(selection, neighbours)
    out = torch.empty_like(q)
    lse = torch.empty(batch, heads, queries, dtype=torch.float32, device=q.device)
    _forward[(counts.shape[1], batch * selectors)](
        q,
        describe(k, selection.block, columns),
        describe(v, selection.block, columns),
        out,
        lse,
        blocks,
        bits,
        counts,
        selection.first_key,
        *q.stride()[:3],
        *out.stride()[:3],
        scale * LOG2_E,
        queries,
        selectors,
        selectors // k.shape[1],
        heads,
        WIDTH=neighbours * selection.slots,
        NEIGHBOURS=neighbours,
        GROUP=group,
        BLOCK=selection.block,
        HEAD_DIM=head_dim,
        D=columns,
        M=rows,
        PRECISION="ieee" if q.dtype == torch.float32 else "tf32",
        num_warps=config.warps,
        num_stages=config.stages,
        maxnreg=config.registers,
    )
    return out, lse


def queries_a_tile(group: int, rows: int) -> int:
    """Neighbouring queries whose `group` heads each fill at most `rows` rows, and at most BITS."""
    return max(1, min(BITS, rows // group))


def unions(selection: Selection, neighbours: int) -> tuple[Tensor, Tensor, Tensor]:
    """Each tile's union of chosen blocks: (blocks, bits, counts).

    blocks and bits int32 `[lines, tiles, neighbours * slots]` by rising block, of which the first `counts`
    `[lines, tiles]` are there: bit i says that the tile's query i chose the block. No size depends on a value.
    """
    lines, slots = selection.batch * selection.selectors, selection.slots
    tiles = triton.cdiv(selection.queries, neighbours)
    chosen = selection.chosen.view(lines, selection.queries, slots)
    padding = tiles * neighbours - selection.queries
    chosen = torch.nn.functional.pad(chosen, (0, 0, 0, padding), value=-1).view(lines * tiles, neighbours * slots)
    # A query's place in the low bits: a block's queries come in their order, the empty slots last.
    place = torch.arange(neighbours * slots, dtype=torch.int32, device=chosen.device) // slots
    order = torch.where(chosen < 0, (1 << 26) - 1, chosen) * BITS + place
    order = order.sort(-1).values
    block, query = order // BITS, order % BITS
    there = block < (1 << 26) - 1
    new = there.clone()
    new[:, 1:] &= block[:, 1:] != block[:, :-1]
    union = new.cumsum(-1) - 1
    width = neighbours * slots
    target = torch.where(there, union, width)
    blocks = torch.zeros(lines * tiles, width + 1, dtype=torch.int32, device=chosen.device)
    blocks.scatter_(1, target, block)  # all that meet in one place are equal
    bits = torch.zeros(lines * tiles, width + 1, dtype=torch.int32, device=chosen.device)
    bits.scatter_add_(1, target, torch.ones_like(query) << query)  # different bits: a sum is a union
    counts = union[:, -1] + 1
    shape = (lines, tiles, -1)
    return (
        blocks[:, :width].contiguous().view(shape),
        bits[:, :width].contiguous().view(shape),
        counts.int().view(lines, tiles),
    )


@triton.jit(do_not_specialize=["queries", "selectors", "selectors_a_kv_head", "heads"])
def _forward(
    q,
    k_desc,
    v_desc,
    out,
    lse,
    blocks,
    bits,
    counts,
    first_key,
    q_batch,
    q_head,
    q_step,
    out_batch,
    out_head,
    out_step,
    log2_scale,
    queries,
    selectors,
    selectors_a_kv_head,
    heads,
    WIDTH: tl.constexpr,
    NEIGHBOURS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    D: tl.constexpr,
    M: tl.constexpr,
    PRECISION: tl.constexpr,
):
    line = tl.program_id(1)
    sequence = line // selectors
    batch = sequence.to(tl.int64)
    selector = line % selectors
    kv_head = selector // selectors_a_kv_head
    tile = line.to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    count = tl.load(counts + tile)

    row = tl.arange(0, M)
    place = row // GROUP
    query = tl.program_id(0) * NEIGHBOURS + place
    head = selector * GROUP + row % GROUP
    live = (place < NEIGHBOURS) & (query < queries)
    column = tl.arange(0, D)
    within = (column < HEAD_DIM)[None, :]
    wide_query = query.to(tl.int64)
    wide_head = head.to(tl.int64)
    qb = tl.load(
        q + batch * q_batch + (wide_query * q_step + wide_head * q_head)[:, None] + column[None, :],
        live[:, None] & within,
        0.0,
    )
    first = tl.load(first_key + batch * queries + query, live, 0)
    latest_first = tl.max(first, 0)
    m = tl.full([M], float("-inf"), tl.float32)
    l = tl.zeros([M], tl.float32)  # noqa: E741
    acc = tl.zeros([M, D], tl.float32)
    # The next block's index is read one step early: TMA cannot start before it is known.
    next_block = tl.load(blocks + tile * WIDTH)
    next_chose = tl.load(bits + tile * WIDTH)
    for step in tl.range(0, count):
        block = next_block
        chose = next_chose
        ahead = tile * WIDTH + tl.minimum(step + 1, count - 1)
        next_block = tl.load(blocks + ahead)
        next_chose = tl.load(bits + ahead)
        kb = k_desc.load([sequence, kv_head, block * BLOCK, 0]).reshape(BLOCK, D)
        s = tl.dot(qb, kb.T, input_precision=PRECISION)
        sees = ((chose >> place) & 1) != 0
        s = tl.where(sees[:, None], s, float("-inf"))
        if latest_first > block * BLOCK:
            key = block * BLOCK + tl.arange(0, BLOCK)
            s = tl.where(key[None, :] >= first[:, None], s, float("-inf"))
        highest = tl.maximum(m, tl.max(s, 1) * log2_scale)
        finite = tl.where(highest == float("-inf"), 0.0, highest)
        p = tl.exp2(s * log2_scale - finite[:, None])
        alpha = tl.exp2(m - finite)
        l = l * alpha + tl.sum(p, 1)  # noqa: E741
        acc = acc * alpha[:, None]
        vb = v_desc.load([sequence, kv_head, block * BLOCK, 0]).reshape(BLOCK, D)
        acc = tl.dot(p.to(vb.dtype), vb, acc, input_precision=PRECISION)
        m = highest

    seen = l > 0
    acc = acc / tl.where(seen, l, 1.0)[:, None]
    tl.store(
        out + batch * out_batch + (wide_query * out_step + wide_head * out_head)[:, None] + column[None, :],
        acc.to(out.dtype.element_ty),
        live[:, None] & within,
    )
    total = tl.where(seen, (m + tl.log2(tl.where(seen, l, 1.0))) * LN_2, float("-inf"))
    tl.store(lse + (batch * heads + head) * queries + query, total, live)

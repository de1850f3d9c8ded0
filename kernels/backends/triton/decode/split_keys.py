"""Attention of a decoding step, with the keys split among programs ("flash decoding", Dao et al. 2023).

`_split` divides the entries that are in use *at run time* equally among its programs, so that a grid whose size follows
from the cache's capacity is balanced at any length. The results go to float32 buffers, and combine.py merges those of
all key sets into one softmax in a fixed order, with the same bits every time. All queries of the query heads of a head
group are the rows of one product (padded to 16, the minimum of the tensor cores), so that each key is read once.

Letters in the kernel: s scores, p weights, m running maximum (of log2(e) * scale * s), l running sum.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.backends.triton import common
from kernels.backends.triton.common import LOG2_E, all_finite, masked_dot, positive_scale
from kernels.backends.triton.decode.combine import combine
from kernels.layout.cached_keys import MAX_QUERIES, CachedKeys

MAX_ROWS = 64
"""Maximum number of rows (a query head and a query each) per program."""

MAX_SPLITS = 128
"""Maximum number of splits per key set; a program of `combine` reads all splits of a row."""


@dataclass(frozen=True)
class DecodeConfig:
    """keys: entries per step. programs: the number of programs per key set and multiprocessor."""

    keys: int
    warps: int
    stages: int
    programs: int


# (bytes per element, padded head_dim) -> settings
_TABLE = {
    (2, 64): DecodeConfig(64, 4, 3, 4),
    (2, 128): DecodeConfig(64, 4, 3, 4),
    (2, 256): DecodeConfig(32, 4, 3, 4),
    # float32 without tf32 does not run on tensor cores, and its products are unrolled: small tiles.
    (4, 64): DecodeConfig(32, 4, 1, 4),
    (4, 128): DecodeConfig(32, 4, 1, 4),
    (4, 256): DecodeConfig(16, 4, 1, 4),
}


def choose(dtype: torch.dtype, head_dim: int) -> DecodeConfig:
    padded = 64 if head_dim <= 64 else 128 if head_dim <= 128 else 256
    return _TABLE[dtype.itemsize, padded]


def unsupported(device: str, dtype: torch.dtype, head_dim: int, queries: int) -> str | None:
    """Why these kernels cannot serve such queries, with what is accepted; None if they can."""
    if queries > MAX_QUERIES:
        return f"{queries} queries: must be at most {MAX_QUERIES}"
    return common.unsupported(device, dtype, head_dim)


def forward(
    q: Tensor,
    key_sets: Sequence[CachedKeys],
    scale: float,
    sink_logits: Tensor | None,
    config: DecodeConfig | None = None,
) -> tuple[Tensor, Tensor]:
    """(out, lse), see kernels.decode_attention. `config`: launch settings, for benchmarks and tests."""
    q, scale = positive_scale(q if q.stride(-1) == 1 else q.contiguous(), scale)
    batch, heads, queries, head_dim = q.shape
    config = config or choose(q.dtype, head_dim)
    columns = triton.next_power_of_2(head_dim)
    processors = torch.cuda.get_device_properties(q.device).multi_processor_count if q.is_cuda else 1
    plans = [_SplitPlan.of(key_set, q, config, processors) for key_set in key_sets]
    splits, rows = sum(each.splits for each in plans), batch * heads * queries
    partial_out = torch.empty(rows, splits, head_dim, dtype=torch.float32, device=q.device)
    partial_lse = torch.empty(rows, splits, dtype=torch.float32, device=q.device)
    first = 0
    for key_set, plan in zip(key_sets, plans, strict=True):
        k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (key_set.k, key_set.v))
        mask = key_set.mask.view(torch.uint8)
        mask = mask if mask.stride(-1) == 1 or mask.shape[-1] == 1 else mask.contiguous()
        slots = key_set.slots
        if slots is not None and slots.stride(-1) != 1:
            slots = slots.contiguous()
        _split[(plan.splits, plan.head_groups * plan.tiles, batch)](
            q,
            k,
            v,
            mask,
            slots,
            key_set.count,
            partial_out,
            partial_lse,
            *q.stride()[:3],
            *k.stride()[:3],
            *v.stride()[:3],
            *_strides(mask, plan.head_groups),
            *(_strides(slots, plan.head_groups)[:4] if slots is not None else (0, 0, 0, 1)),
            scale * LOG2_E,
            mask.shape[3],
            heads,
            first,
            splits,
            QUERIES=queries,
            GROUP=plan.group,
            GROUPS_PER_KV_HEAD=plan.head_groups // k.shape[1],
            TILES=plan.tiles,
            PAGE=key_set.page,
            ROWS_DIFFER=mask.shape[2] > 1,
            HEAD_DIM=head_dim,
            M=plan.rows,
            N=plan.keys,
            D=columns,
            PRECISION="ieee" if q.dtype == torch.float32 else "tf32",
            num_warps=config.warps,
            num_stages=config.stages,
        )
        first += plan.splits
    return combine(partial_out, partial_lse, sink_logits, q)


@dataclass(frozen=True)
class _SplitPlan:
    """How the work on one key set is divided: `splits` of the entries, and `tiles` of `rows` rows per head group."""

    head_groups: int
    group: int
    tiles: int
    rows: int
    keys: int
    splits: int

    @staticmethod
    def of(key_set: CachedKeys, q: Tensor, config: DecodeConfig, processors: int) -> "_SplitPlan":
        batch, heads, queries, _ = q.shape
        head_groups = max(
            key_set.k.shape[1], key_set.mask.shape[1], 1 if key_set.slots is None else key_set.slots.shape[1]
        )
        rows = heads // head_groups * queries
        size = min(MAX_ROWS, max(16, triton.next_power_of_2(rows)))
        tiles, entries = triton.cdiv(rows, size), key_set.mask.shape[3]
        keys = min(config.keys, max(16, triton.next_power_of_2(entries)))
        wanted = max(1, config.programs * processors // (batch * head_groups * tiles))
        splits = max(1, min(wanted, triton.cdiv(entries, keys), MAX_SPLITS))
        return _SplitPlan(head_groups, heads // head_groups, tiles, size, keys, splits)


def _strides(x: Tensor, head_groups: int) -> tuple[int, int, int, int]:
    """(strides of x's sequences, groups and queries, and the number of head groups per group of x).

    x `[batch or 1, groups, (queries or 1,) entries]`. Broadcast dimensions have stride 0.
    """
    batch, group, *query = (0 if n == 1 else step for n, step in zip(x.shape[:-1], x.stride()[:-1], strict=True))
    return batch, group, *(query or (0,)), head_groups // x.shape[1]


@triton.jit(do_not_specialize=["entries", "heads", "first", "splits", "mask_batch", "slots_batch"])
def _split(
    q,
    k,
    v,
    mask,
    slots,
    count,
    partial_out,
    partial_lse,
    q_batch,
    q_head,
    q_step,
    k_batch,
    k_head,
    k_step,
    v_batch,
    v_head,
    v_step,
    mask_batch,
    mask_group,
    mask_step,
    groups_per_mask,
    slots_batch,
    slots_group,
    slots_step,
    groups_per_list,
    scale,
    entries,
    heads,
    first,
    splits,
    QUERIES: tl.constexpr,
    GROUP: tl.constexpr,
    GROUPS_PER_KV_HEAD: tl.constexpr,
    TILES: tl.constexpr,
    PAGE: tl.constexpr,
    ROWS_DIFFER: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    split = tl.program_id(0)
    head_group = tl.program_id(1) // TILES
    batch = tl.program_id(2).to(tl.int64)
    kv_head = head_group // GROUPS_PER_KV_HEAD
    row = tl.program_id(1) % TILES * M + tl.arange(0, M)
    live_row = row < GROUP * QUERIES
    head = head_group * GROUP + row // QUERIES
    query = row % QUERIES
    column = tl.arange(0, D)
    in_column = column < HEAD_DIM

    live = entries
    if count is not None:
        live = tl.minimum(tl.load(count + batch).to(tl.int32), entries)
    entries_per_split = tl.cdiv(tl.cdiv(live, N), tl.num_programs(0)) * N
    start = split * entries_per_split
    stop = tl.minimum(start + entries_per_split, live)
    to = ((batch * heads + head) * QUERIES + query) * splits + first + split
    if start >= stop:
        tl.store(partial_lse + to, tl.full([M], float("-inf"), tl.float32), live_row)
        return

    qb = tl.load(
        q + batch * q_batch + head[:, None] * q_head + query[:, None] * q_step + column[None, :],
        live_row[:, None] & in_column[None, :],
        0.0,
    )
    k_base = k + batch * k_batch + kv_head * k_head
    v_base = v + batch * v_batch + kv_head * v_head
    mask_base = mask + batch * mask_batch + head_group // groups_per_mask * mask_group
    m = tl.full([M], float("-inf"), tl.float32)
    l = tl.zeros([M], tl.float32)  # noqa: E741
    acc = tl.zeros([M, D], tl.float32)
    for at in tl.range(start, stop, N):
        entry = at + tl.arange(0, N)
        read = entry < stop
        slot = entry.to(tl.int64)
        if slots is not None:
            list_base = slots + batch * slots_batch + head_group // groups_per_list * slots_group
            page = tl.load(list_base + entry // PAGE, read, -1).to(tl.int64)
            read = read & (page >= 0)
            slot = page * PAGE + entry % PAGE
        if ROWS_DIFFER:
            where = live_row[:, None] & read[None, :]
            seen = tl.load(mask_base + query[:, None] * mask_step + entry[None, :], where, 0) != 0
            read = tl.max(seen.to(tl.int32), 0) > 0
        else:
            read = tl.load(mask_base + entry, read, 0) != 0
            seen = read[None, :]
        # Keys that no row sees are not read: they cost no memory traffic and may hold any value.
        taken = read[:, None] & in_column[None, :]
        kb = tl.load(k_base + slot[:, None] * k_step + column[None, :], taken, 0.0)
        vb = tl.load(v_base + slot[:, None] * v_step + column[None, :], taken, 0.0)
        s = tl.dot(qb, kb.T, input_precision=PRECISION) * scale
        s = tl.where(seen, s, float("-inf"))
        highest = tl.maximum(m, tl.max(s, 1))
        # In a row without visible keys so far, any finite maximum gives p = 0.
        finite = tl.where(highest == float("-inf"), 0.0, highest)
        p = tl.exp2(s - finite[:, None])
        alpha = tl.exp2(m - finite)
        l = l * alpha + tl.sum(p, 1)  # noqa: E741
        acc = acc * alpha[:, None]
        if ROWS_DIFFER:  # a key may be visible to one row, hidden from another, and hold NaN
            if all_finite(vb.to(tl.float32)):
                acc = tl.dot(p.to(vb.dtype), vb, acc, input_precision=PRECISION)
            else:
                acc = masked_dot(tl.where(seen, p, 0.0), vb, seen, acc, PRECISION)
        else:
            acc = tl.dot(p.to(vb.dtype), vb, acc, input_precision=PRECISION)
        m = highest

    some = l != 0  # True for NaN, too
    total = tl.where(some, l, 1.0)
    tl.store(
        partial_out + to[:, None] * HEAD_DIM + column[None, :],
        acc / total[:, None],
        live_row[:, None] & in_column[None, :],
    )
    tl.store(partial_lse + to, tl.where(some, m + tl.log2(total), float("-inf")), live_row)

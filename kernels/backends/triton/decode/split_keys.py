"""Decoding: few queries, keys in the slots of a cache, split among programs ("flash decoding", Dao et al. 2023).

`_split` gives one program an equal share of the entries that are live *now*, so that a grid whose size follows from
the cache's capacity is balanced at any length; what it has found goes to a float32 buffer, and combine.py makes
one softmax of all shares of all parts, in their order: the same bits every time. The query heads of a line, and all
their queries, are the rows of one product (padded to 16, the least that the tensor cores take), so that a key is read
once.

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

MOST_ROWS = 64
"""Rows (a query head and a query each) of one program."""

MOST_SPLITS = 128
"""Shares of a part: what `combine` must walk through, one row a program."""


@dataclass(frozen=True)
class DecodeConfig:
    """keys: entries a step. programs: wanted of a part, for every multiprocessor of the device."""

    keys: int
    warps: int
    stages: int
    programs: int


# (bytes an element, padded head_dim) -> choice
_TABLE = {
    (2, 64): DecodeConfig(64, 4, 3, 4),
    (2, 128): DecodeConfig(64, 4, 3, 4),
    (2, 256): DecodeConfig(32, 4, 3, 4),
    # float32 without tf32 runs on the ordinary units, and its products are unrolled: small tiles.
    (4, 64): DecodeConfig(32, 4, 1, 4),
    (4, 128): DecodeConfig(32, 4, 1, 4),
    (4, 256): DecodeConfig(16, 4, 1, 4),
}


def choose(dtype: torch.dtype, head_dim: int) -> DecodeConfig:
    padded = 64 if head_dim <= 64 else 128 if head_dim <= 128 else 256
    return _TABLE[dtype.itemsize, padded]


def unsupported(device: str, dtype: torch.dtype, head_dim: int, queries: int) -> str | None:
    """Why these kernels cannot serve so many queries per head; None where they can."""
    if queries > MAX_QUERIES:
        return f"{queries} queries: must be at most {MAX_QUERIES}"
    return common.unsupported(device, dtype, head_dim)


def forward(
    q: Tensor, parts: Sequence[CachedKeys], scale: float, sink_logits: Tensor | None, config: DecodeConfig | None = None
) -> tuple[Tensor, Tensor]:
    """(out, lse), see kernels.decode_attention. `config` is for benchmarks and tests."""
    q, scale = positive_scale(q if q.stride(-1) == 1 else q.contiguous(), scale)
    batch, heads, queries, head_dim = q.shape
    config = config or choose(q.dtype, head_dim)
    columns = triton.next_power_of_2(head_dim)
    processors = torch.cuda.get_device_properties(q.device).multi_processor_count if q.is_cuda else 1
    shares = [_Shares.of(part, q, config, processors) for part in parts]
    splits, rows = sum(each.splits for each in shares), batch * heads * queries
    partial_out = torch.empty(rows, splits, head_dim, dtype=torch.float32, device=q.device)
    partial_lse = torch.empty(rows, splits, dtype=torch.float32, device=q.device)
    first = 0
    for part, share in zip(parts, shares, strict=True):
        k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (part.k, part.v))
        mask = part.mask.view(torch.uint8)
        mask = mask if mask.stride(-1) == 1 or mask.shape[-1] == 1 else mask.contiguous()
        slots = part.slots
        if slots is not None and slots.stride(-1) != 1:
            slots = slots.contiguous()
        _split[(share.splits, share.lines * share.tiles, batch)](
            q,
            k,
            v,
            mask,
            slots,
            part.count,
            partial_out,
            partial_lse,
            *q.stride()[:3],
            *k.stride()[:3],
            *v.stride()[:3],
            *_steps(mask, share.lines),
            *(_steps(slots, share.lines)[:4] if slots is not None else (0, 0, 0, 1)),
            scale * LOG2_E,
            mask.shape[3],
            heads,
            first,
            splits,
            QUERIES=queries,
            GROUP=share.group,
            LINES_A_KV_HEAD=share.lines // k.shape[1],
            TILES=share.tiles,
            PAGE=part.page,
            ROWS_DIFFER=mask.shape[2] > 1,
            HEAD_DIM=head_dim,
            M=share.rows,
            N=share.keys,
            D=columns,
            PRECISION="ieee" if q.dtype == torch.float32 else "tf32",
            num_warps=config.warps,
            num_stages=config.stages,
        )
        first += share.splits
    return combine(partial_out, partial_lse, sink_logits, q)


@dataclass(frozen=True)
class _Shares:
    """How one part's work is cut. tiles: of `rows` rows, in which a line's query heads and queries are taken."""

    lines: int
    group: int
    tiles: int
    rows: int
    keys: int
    splits: int

    @staticmethod
    def of(part: CachedKeys, q: Tensor, config: DecodeConfig, processors: int) -> "_Shares":
        batch, heads, queries, _ = q.shape
        lines = max(part.k.shape[1], part.mask.shape[1], 1 if part.slots is None else part.slots.shape[1])
        rows = heads // lines * queries
        size = min(MOST_ROWS, max(16, triton.next_power_of_2(rows)))
        tiles, entries = triton.cdiv(rows, size), part.mask.shape[3]
        keys = min(config.keys, max(16, triton.next_power_of_2(entries)))
        wanted = max(1, config.programs * processors // (batch * lines * tiles))
        splits = max(1, min(wanted, triton.cdiv(entries, keys), MOST_SPLITS))
        return _Shares(lines, heads // lines, tiles, size, keys, splits)


def _steps(x: Tensor, lines: int) -> tuple[int, int, int, int]:
    """(step of a sequence, of as many lines as share one of x's, of a query, and how many lines share one), 0 along
    dimensions that serve all; x `[batch or 1, lines or fewer, (queries or 1,) entries]`."""
    batch, line, *query = (0 if n == 1 else step for n, step in zip(x.shape[:-1], x.stride()[:-1], strict=True))
    return batch, line, *(query or (0,)), lines // x.shape[1]


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
    mask_line,
    mask_step,
    lines_a_mask,
    slots_batch,
    slots_line,
    slots_step,
    lines_a_list,
    scale,
    entries,
    heads,
    first,
    splits,
    QUERIES: tl.constexpr,
    GROUP: tl.constexpr,
    LINES_A_KV_HEAD: tl.constexpr,
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
    line = tl.program_id(1) // TILES
    batch = tl.program_id(2).to(tl.int64)
    kv_head = line // LINES_A_KV_HEAD
    row = tl.program_id(1) % TILES * M + tl.arange(0, M)
    live_row = row < GROUP * QUERIES
    head = line * GROUP + row // QUERIES
    query = row % QUERIES
    column = tl.arange(0, D)
    in_column = column < HEAD_DIM

    live = entries
    if count is not None:
        live = tl.minimum(tl.load(count + batch).to(tl.int32), entries)
    share = tl.cdiv(tl.cdiv(live, N), tl.num_programs(0)) * N
    start = split * share
    stop = tl.minimum(start + share, live)
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
    mask_base = mask + batch * mask_batch + line // lines_a_mask * mask_line
    m = tl.full([M], float("-inf"), tl.float32)
    l = tl.zeros([M], tl.float32)  # noqa: E741
    acc = tl.zeros([M, D], tl.float32)
    for at in tl.range(start, stop, N):
        entry = at + tl.arange(0, N)
        read = entry < stop
        slot = entry.to(tl.int64)
        if slots is not None:
            list_base = slots + batch * slots_batch + line // lines_a_list * slots_line
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
        # What nobody sees is not read: it costs no memory traffic, and may hold anything.
        taken = read[:, None] & in_column[None, :]
        kb = tl.load(k_base + slot[:, None] * k_step + column[None, :], taken, 0.0)
        vb = tl.load(v_base + slot[:, None] * v_step + column[None, :], taken, 0.0)
        s = tl.dot(qb, kb.T, input_precision=PRECISION) * scale
        s = tl.where(seen, s, float("-inf"))
        highest = tl.maximum(m, tl.max(s, 1))
        # A row that has seen nothing yet: any finite number gives p = 0.
        finite = tl.where(highest == float("-inf"), 0.0, highest)
        p = tl.exp2(s - finite[:, None])
        alpha = tl.exp2(m - finite)
        l = l * alpha + tl.sum(p, 1)  # noqa: E741
        acc = acc * alpha[:, None]
        if ROWS_DIFFER:  # one row's key may be hidden from another, and hold NaN
            if all_finite(vb.to(tl.float32)):
                acc = tl.dot(p.to(vb.dtype), vb, acc, input_precision=PRECISION)
            else:
                acc = masked_dot(tl.where(seen, p, 0.0), vb, seen, acc, PRECISION)
        else:
            acc = tl.dot(p.to(vb.dtype), vb, acc, input_precision=PRECISION)
        m = highest

    some = l != 0  # a NaN is seen
    total = tl.where(some, l, 1.0)
    tl.store(
        partial_out + to[:, None] * HEAD_DIM + column[None, :],
        acc / total[:, None],
        live_row[:, None] & in_column[None, :],
    )
    tl.store(partial_lse + to, tl.where(some, m + tl.log2(total), float("-inf")), live_row)

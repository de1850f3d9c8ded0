"""Attention of a decoding step against the oracle: dense softmax attention in float64 over keys picked one by one.

Plain PyTorch in every dtype; the Triton kernel on a GPU, and in Triton's interpreter elsewhere (float16 and float32:
it multiplies bfloat16 wrongly).
"""

import pytest
import torch

from kernels.backends import direct
from kernels.decoding.decode_attention import decode_attention
from kernels.layout.cached_keys import CachedKeys
from tests.kernels.oracle import RELATIVE_ERROR, dense_attention

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
gpu = pytest.mark.gpu
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
TOLERANCE = {torch.float32: 4e-6, torch.float16: 1.5e-3, torch.bfloat16: 1e-2}
"""Of out, relative to its largest element; lse is float32 whatever the inputs."""


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def draw(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64).to(dtype)


def plain_case(dtype: torch.dtype, queries: int = 3, size: float = 3.0):
    """q, k, v of 4 query heads on 2 KV heads, scores of some `size`; a mask that leaves the last query with nothing."""
    q, k, v = size * draw(2, 4, queries, 8, seed=0), draw(2, 2, 50, 8, seed=1), draw(2, 2, 50, 8, seed=2)
    mask = torch.rand(2, 2, queries, 50, generator=generator(3)) < 0.5
    mask[:, :, -1] = False
    return q.to(dtype), k.to(dtype), v.to(dtype), mask


def pieces(k, v, mask) -> list[CachedKeys]:
    return [CachedKeys(k[:, :, s], v[:, :, s], mask[..., s]) for s in (slice(0, 7), slice(7, 8), slice(8, 50))]


@pytest.mark.parametrize("dtype", RELATIVE_ERROR, ids=str)
def test_plain_pytorch_equals_the_oracle_over_all_parts(dtype):
    q, k, v, mask = plain_case(dtype)
    out, lse = decode_attention(q, pieces(k, v, mask), scale=0.4, backend="direct")
    expected, expected_lse = dense_attention(q, k, v, mask, 0.4)
    assert out.dtype == dtype and lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert (out.double() - expected).abs().max() <= RELATIVE_ERROR[dtype] * expected.abs().max()
    assert torch.equal(lse.isfinite(), expected_lse.isfinite()) and not lse[:, :, -1].isfinite().any()
    finite = expected_lse.isfinite()
    limit = (
        RELATIVE_ERROR[torch.float64 if dtype == torch.float64 else torch.float32] * expected_lse[finite].abs().max()
    )
    assert (lse.double() - expected_lse)[finite].abs().max() <= limit  # scores are summed in float32, always


def test_groups_of_queries_and_masks_of_one_row_change_nothing(monkeypatch):
    q, k, v, mask = plain_case(torch.float64, queries=11)
    same = torch.rand(2, 1, 1, 50, generator=generator(1)) < 0.5
    whole = direct.attend(q, [*pieces(k, v, mask), CachedKeys(v, k, same)], 0.4)
    monkeypatch.setattr("kernels.backends.direct.SCORES_PER_CHUNK", 2 * 4 * 100 * 2)
    cut = direct.attend(q, [*pieces(k, v, mask), CachedKeys(v, k, same)], 0.4)
    for got, wanted in zip(cut, whole, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-13, atol=0)


KV_HEADS, SLOTS = 2, 160
CASES = {
    # name: group, queries, head_dim, parts as (entries, lines of the mask, its queries, lines of the list, page)
    "one_query": (3, 1, 64, [(130, 1, 1, None, 1)]),
    "several_queries": (2, 5, 32, [(130, 1, 5, None, 1), (5, 1, 5, None, 1)]),
    "a_head_each": (1, 1, 96, [(70, 2, 1, 2, 1)]),
    "a_list_for_all": (4, 1, 64, [(100, 2, 1, 1, 1), (1, 1, 1, None, 1)]),
    "pages_a_kv_head": (4, 2, 128, [(96, 1, 2, 2, 16), (60, 2, 1, None, 1)]),
    "pages_a_query_head": (3, 1, 32, [(64, 6, 1, 6, 32), (20, 2, 1, None, 1)]),
    "pages_a_query_head_and_a_mask_a_kv_head": (2, 1, 32, [(48, 2, 1, 4, 16)]),
    "more_rows_than_a_tile": (12, 8, 32, [(90, 1, 8, 1, 1)]),
    "large_heads": (2, 1, 192, [(40, 1, 1, None, 1)]),
}


def make(name: str, dtype: torch.dtype, ragged: bool = True):
    """(q, parts; the same keys as one k, v and mask for the oracle, by query head). What no list names, and what no
    query sees, is NaN."""
    group, queries, head_dim, described = CASES[name]
    heads, batch = KV_HEADS * group, 2
    q, parts, keys, values, masks = 2 * draw(batch, heads, queries, head_dim, seed=0, dtype=dtype), [], [], [], []
    for index, (entries, lines, rows, list_lines, page) in enumerate(described, 1):
        k, v = (draw(batch, KV_HEADS, SLOTS, head_dim, seed=10 * index + i, dtype=dtype) for i in range(2))
        mask = torch.rand(batch, lines, rows, entries, generator=generator(100 + index)) < 0.7
        count = torch.tensor([entries, max(1, entries // 3)]) if ragged else None
        slots = None
        if list_lines:
            order = [torch.randperm(SLOTS // page, generator=generator(7 * i)) for i in range(batch * list_lines)]
            slots = torch.stack(order)[:, : entries // page].view(batch, list_lines, -1).clone()
            slots[:, :, 1] = -1
        by_head = lambda x: x.repeat_interleave(heads // x.shape[1], 1)  # noqa: E731
        listed = torch.arange(entries).expand(batch, 1, -1)
        if slots is not None:
            listed = (slots[..., None] * page + torch.arange(page)).flatten(2)
            listed = torch.where((slots < 0).repeat_interleave(page, 2), -1, listed)
        listed, seen = by_head(listed), by_head(mask).expand(-1, -1, queries, -1)
        seen = seen & (listed >= 0)[:, :, None]
        if count is not None:
            seen = seen & (torch.arange(entries) < count[:, None])[:, None, None]
        index_of = listed.clamp(min=0)[..., None].expand(-1, -1, -1, head_dim)
        keys.append(by_head(k).gather(2, index_of))
        values.append(by_head(v).gather(2, index_of))
        masks.append(seen)
        read = torch.zeros(batch, heads, SLOTS, dtype=torch.int64)
        read.scatter_add_(2, listed.clamp(min=0), seen.any(2).long())
        read = read.view(batch, KV_HEADS, group, SLOTS).any(2)
        k, v = (x.masked_fill(~read[..., None], torch.nan) for x in (k, v))
        parts.append(CachedKeys(k, v, mask, slots, count, page))
    truth = tuple(torch.cat(each, dim) for each, dim in ((keys, 2), (values, 2), (masks, 3)))
    return q, parts, truth


def moved(parts: list[CachedKeys], device: str = DEVICE) -> list[CachedKeys]:
    return [CachedKeys(*(x.to(device) if isinstance(x, torch.Tensor) else x for x in part)) for part in parts]


def check(name: str, dtype: torch.dtype, sinks: bool, config=None, scale: float | None = None) -> None:
    q, parts, (k, v, mask) = make(name, dtype)
    sink_logits = draw(q.shape[1], seed=5, dtype=torch.float32) if sinks else None
    expected, expected_lse = dense_attention(q, k, v, mask, scale or q.shape[-1] ** -0.5, sink_logits)
    if config is None:
        on_device = None if sink_logits is None else sink_logits.to(DEVICE)
        out, lse = decode_attention(q.to(DEVICE), moved(parts), scale=scale, sink_logits=on_device, backend="triton")
    else:
        from kernels.backends.triton import decode

        out, lse = decode.forward(q.to(DEVICE), moved(parts), q.shape[-1] ** -0.5, None, config)
    assert out.dtype == dtype and lse.dtype == torch.float32
    out, lse = out.cpu().double(), lse.cpu().double()
    assert (out - expected).abs().max() <= TOLERANCE[dtype] * expected.abs().max()
    assert torch.equal(lse.isfinite(), expected_lse.isfinite())
    finite = expected_lse.isfinite()
    assert (lse - expected_lse)[finite].abs().max() <= 4e-6 * expected_lse[finite].abs().max()


@pytest.mark.parametrize(
    ("dtype", "sinks"),
    [
        (torch.float32, True),
        (torch.float16, False),
        pytest.param(torch.bfloat16, True, marks=[gpu, needs_cuda]),
        pytest.param(torch.bfloat16, False, marks=[gpu, needs_cuda]),
    ],
)
@pytest.mark.parametrize("name", CASES)
def test_the_kernel_equals_the_oracle(name, dtype, sinks):
    pytest.importorskip("triton")
    check(name, dtype, sinks)


@pytest.mark.parametrize(("keys", "programs"), [(16, 1), (16, 7), (32, 1000), (128, 3)])
@pytest.mark.parametrize("name", ["several_queries", "pages_a_kv_head"])
def test_shares_and_steps_change_nothing(name, keys, programs, monkeypatch):
    """One program for all keys, or more than there are keys; shares that are merged two by two."""
    pytest.importorskip("triton")
    from kernels.backends.triton.decode.split_keys import DecodeConfig

    monkeypatch.setattr("kernels.backends.triton.decode.combine.SPLITS_PER_STEP", 2)
    check(name, torch.float32, False, DecodeConfig(keys, 4, 1, programs))


def test_a_negative_scale():
    pytest.importorskip("triton")
    check("several_queries", torch.float32, True, scale=-0.3)


@pytest.mark.parametrize("name", CASES)
def test_plain_pytorch_picks_the_same_keys(name):
    q, parts, (k, v, mask) = make(name, torch.float64)
    parts = [part._replace(k=part.k.nan_to_num(7.0), v=part.v.nan_to_num(7.0)) for part in parts]
    sinks = draw(q.shape[1], seed=5)
    found = decode_attention(q, parts, sink_logits=sinks)
    for got, wanted in zip(found, dense_attention(q, k, v, mask, q.shape[-1] ** -0.5, sinks), strict=True):
        assert (got - wanted).abs().max() <= 1e-13


@pytest.mark.parametrize("backend", ["direct", "triton"])
def test_a_query_that_sees_nothing_gets_zero(backend):
    pytest.importorskip("triton")
    q, k, v, mask = (t.to(DEVICE) for t in plain_case(torch.float32))
    q, k, v = (torch.nn.functional.pad(t, (0, 24)) for t in (q, k, v))
    out, lse = decode_attention(q, [CachedKeys(k, v, mask), CachedKeys(k, v, mask[..., :1] & False)], backend=backend)
    assert (out[:, :, -1] == 0).all() and (lse[:, :, -1] == -torch.inf).all() and lse[:, :, 0].isfinite().all()


def test_any_strides():
    pytest.importorskip("triton")
    q, parts, (k, v, mask) = make("pages_a_kv_head", torch.float32)
    mix = lambda x: x.transpose(1, 2).contiguous().transpose(1, 2)  # noqa: E731
    turned = [
        CachedKeys(part.k.mT.contiguous().mT, mix(part.v), mix(part.mask), part.slots, part.count, part.page)
        for part in parts
    ]
    out, _ = decode_attention(mix(q).to(DEVICE), moved(turned), backend="triton")
    expected, _ = dense_attention(q, k, v, mask, q.shape[-1] ** -0.5)
    assert (out.cpu().double() - expected).abs().max() <= 4e-6 * expected.abs().max()


def test_what_does_not_fit_is_refused_in_one_line():
    q, k, v, mask = plain_case(torch.float32)
    for parts, message in [
        ([], r"key_sets=\[\]: must hold at least one"),
        ([CachedKeys(k, v[:, :1], mask)], r"k \(2, 2, 50, 8\) and v \(2, 1, 50, 8\)"),
        (
            [CachedKeys(k.half(), v.half(), mask)],
            "torch.float32, torch.float16, torch.float16: must have the same dtype",
        ),
        (
            [CachedKeys(k, v, mask.int())],
            r"mask torch.int32 .*: must be booleans \[2 or 1, one of \(1, 2, 4\), 3 or 1, ent",
        ),
        ([CachedKeys(k[:, :, :9], v[:, :, :9], mask)], "mask has 50 entries: must be at most k's, 9"),
        (
            [CachedKeys(k, v, mask, torch.zeros(2, 1, 3), None, 16)],
            r"slots \(2, 1, 3\): must be .* 50 entries / the page, 16",
        ),
        ([CachedKeys(k[:1], v[:1], mask)], r"k \(1, 2, 50, 8\): must be \[2, a divisor of 4, slots, 8\]"),
    ]:
        with pytest.raises(ValueError, match=message):
            decode_attention(q, parts)
    part = [CachedKeys(k, v, mask)]
    with pytest.raises(ValueError, match="backend='flash': must be one of auto, direct, triton"):
        decode_attention(q, part, backend="flash")
    with pytest.raises(ValueError, match="backend='triton' cannot serve this call: head_dim 8: must be one of 32"):
        decode_attention(q, part, backend="triton")
    with pytest.raises(ValueError, match="backend='triton' cannot serve this call: 17 queries: must be at most 16"):
        decode_attention(
            q.expand(-1, -1, 17, -1)[:, :, :17] if q.shape[2] == 1 else q[:, :, [0] * 17],
            [part[0].for_queries(slice(0, 1))],
            backend="triton",
        )
    with pytest.raises(ValueError, match=r"sink_logits \(3,\): must be \[4\]"):
        decode_attention(q, part, sink_logits=torch.zeros(3))


@gpu
@needs_cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_on_the_gpu_it_waits_for_nothing_and_repeats_its_bits_in_a_graph(dtype):
    """Counts change between replays of one graph: results are those of a call with the same counts."""
    q, parts, _ = make("pages_a_kv_head", dtype)
    q, parts = q.cuda(), moved(parts)
    decode_attention(q, parts)  # compiles
    eager = []
    torch.cuda.set_sync_debug_mode("error")
    try:
        for shift in range(3):
            eager.append(decode_attention(q, [part._replace(count=part.count - shift) for part in parts]))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    counts = [part.count.clone() for part in parts]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = decode_attention(q, [part._replace(count=c) for part, c in zip(parts, counts, strict=True)])
    for _, shift in [(0, 2), (1, 0), (2, 1)]:
        for count, part in zip(counts, parts, strict=True):
            count.copy_(part.count - shift)
        graph.replay()
        for got, wanted in zip(found, eager[shift], strict=True):
            assert torch.equal(got, wanted)

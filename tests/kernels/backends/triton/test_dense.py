"""The Triton kernels against a dense softmax in float64 whose mask is built pair by pair, without the layout.

On a CPU they run in Triton's interpreter (which multiplies bfloat16 wrongly: float16 and float32 there); tests marked
`gpu` want CUDA.
"""

import pytest
import torch

triton = pytest.importorskip("triton")

from kernels import Axis, build_layout, patterns  # noqa: E402
from kernels.backends.triton import dense as backend  # noqa: E402
from kernels.backends.triton.dense.tile_sizes import Config, choose  # noqa: E402
from kernels.summaries.hierarchy import build_hierarchy  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
gpu = pytest.mark.gpu
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")

PATTERNS = {
    "dense": patterns.Dense(),
    "window": patterns.Window(21),
    "window_sink": patterns.Window(9, sink_tokens=3),
    "dilated": patterns.Dilated(5, 3),
    "strided": patterns.Strided(10, 8, 2),
    "fixed": patterns.Fixed(12, 3),
    "block_sparse": patterns.BlockSparse(16, 2, 1, 1),
}
TOLERANCE = {torch.float32: 4e-6, torch.float16: 1.5e-3, torch.bfloat16: 1e-2}


def visible_pairs(pattern, queries, keys, documents=None, offset=0):
    """bool [batch, queries, keys], from the pattern's own words alone."""
    if documents is None:
        query = torch.arange(offset, offset + queries)[None, :, None]
        key = torch.arange(keys)[None, None, :]
        same = torch.ones(1, queries, keys, dtype=torch.bool)
    else:
        start = torch.zeros_like(documents)
        for i in range(1, documents.shape[1]):
            same_as_before = documents[:, i] == documents[:, i - 1]
            start[:, i] = torch.where(same_as_before, start[:, i - 1], i)
        position = torch.arange(documents.shape[1]) - start
        query, key = position[:, :, None], position[:, None, :]
        same = start[:, :, None] == start[:, None, :]
    return same & (key <= query) & pattern.visible(query, key, key + 1)


def oracle(q, k, v, mask, scale, grad_out, grad_lse):
    """(out, lse, dq, dk, dv) in float64; mask [batch or 1, kv_heads or 1, queries, keys]."""
    q, k, v = (t.detach().double().requires_grad_() for t in (q, k, v))
    batch, heads = q.shape[:2]
    group = heads // k.shape[1]
    scores = q @ k.repeat_interleave(group, 1).mT * scale
    full = mask.to(q.device).expand(batch, k.shape[1], -1, -1).repeat_interleave(group, 1)
    seen = full.any(-1)
    scores = torch.where(full, scores, -1e300)
    lse = torch.logsumexp(scores, -1)
    weights = torch.where(full, (scores - lse[..., None]).exp(), 0.0)
    out = weights @ v.repeat_interleave(group, 1)
    lse = torch.where(seen, lse, 0.0)
    torch.autograd.backward([out, lse], [grad_out.double(), grad_lse.double() * seen])
    return out.detach(), torch.where(seen, lse.detach(), -torch.inf), q.grad, k.grad, v.grad


def tensors(batch, heads, kv_heads, queries, keys, head_dim, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    make = lambda h, n: torch.randn(batch, h, n, head_dim, generator=generator).to(DEVICE, dtype)  # noqa: E731
    q, k, v, grad_out = make(heads, queries), make(kv_heads, keys), make(kv_heads, keys), make(heads, queries)
    grad_lse = torch.randn(batch, heads, queries, generator=generator).to(DEVICE)
    return q, k, v, grad_out, grad_lse


def check(layout, mask, q, k, v, grad_out, grad_lse, scale=None, tolerance=None):
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    assert backend.unsupported(q, k, v, layout) is None
    expected = oracle(
        q, k, v, mask, scale, grad_out, torch.zeros_like(grad_out[..., 0]) if grad_lse is None else grad_lse
    )
    out, lse = backend.forward(q, k, v, layout, scale)
    grads = backend.backward(grad_out, grad_lse, q, k, v, out, lse, layout, scale)
    assert out.dtype == q.dtype and out.shape == q.shape and lse.dtype == torch.float32
    tolerance = tolerance or TOLERANCE[q.dtype]
    empty = expected[1] == -torch.inf
    assert torch.equal(lse == -torch.inf, empty)
    assert not out[empty].any() and not grads[0][empty].any()
    torch.testing.assert_close(
        lse.double()[~empty], expected[1][~empty], atol=1e-5 if q.dtype == torch.float32 else 1e-3, rtol=1e-5
    )
    for name, got, want in zip(("out", "dq", "dk", "dv"), (out, *grads), (expected[0], *expected[2:]), strict=True):
        error = (got.double() - want).norm() / want.norm().clamp(min=1e-6)
        assert error < tolerance, f"{name}: relative error {error:.1e}"
    return out, lse, grads


# Each line: pattern, queries, heads, kv_heads, head_dim, block, dtype. Every setting meets several others.
CASES = [
    ("dense", 50, 2, 2, 32, 16, torch.float32),
    ("dense", 64, 4, 1, 64, 32, torch.float16),
    ("window", 50, 4, 1, 32, 16, torch.float16),
    ("window", 77, 2, 2, 96, 32, torch.float32),
    ("window_sink", 70, 4, 2, 32, 16, torch.float32),
    ("dilated", 40, 2, 1, 64, 16, torch.float32),
    ("strided", 67, 4, 1, 32, 16, torch.float32),
    ("strided", 80, 2, 2, 96, 16, torch.float16),
    ("fixed", 61, 4, 1, 64, 32, torch.float16),
    ("block_sparse", 100, 4, 1, 32, 16, torch.float32),
    ("block_sparse", 96, 1, 1, 192, 32, torch.float16),
    ("window", 33, 1, 1, 256, 16, torch.float16),
    ("window", 150, 1, 1, 32, 64, torch.float16),
    ("block_sparse", 300, 2, 1, 64, 128, torch.float16),
]


@pytest.mark.parametrize(("name", "length", "heads", "kv_heads", "head_dim", "block", "dtype"), CASES)
def test_matches_the_oracle(name, length, heads, kv_heads, head_dim, block, dtype):
    layout = build_layout(PATTERNS[name], Axis.tokens(length, device=DEVICE), block=block)
    mask = visible_pairs(PATTERNS[name], length, length)[:, None]
    check(layout, mask, *tensors(1, heads, kv_heads, length, length, head_dim, dtype))


@pytest.mark.parametrize("name", ["window", "strided", "block_sparse"])
def test_documents(name):
    documents = torch.stack([torch.arange(60) // 23, torch.arange(60) // 31])
    layout = build_layout(PATTERNS[name], Axis.tokens(60, documents.to(DEVICE)), block=16)
    mask = visible_pairs(PATTERNS[name], 60, 60, documents)[:, None]
    check(layout, mask, *tensors(2, 2, 1, 60, 60, 32, torch.float32))


def tokens_and_summaries(pattern, length, block, documents=None):
    """(a layout of three kinds of keys with padding between them, what is visible, pair by pair)."""
    queries = Axis.tokens(length, documents, device=DEVICE)
    hierarchy = build_hierarchy(pattern, queries, block)
    query, query_document = queries.start[..., None].cpu(), queries.document[..., None].cpu()
    masks = []
    for keys in (level.axis for level in hierarchy.levels):
        start, end, document = (t[:, None].cpu() for t in (keys.start, keys.end, keys.document))
        seen = pattern.visible(query, start, end) & (end <= query + 1) & (document == query_document)
        masks.append(torch.nn.functional.pad(seen, (0, -keys.length % block)))
    assert hierarchy.layout.keys == sum(mask.shape[-1] for mask in masks)
    return hierarchy.layout, torch.cat(masks, -1)[:, None]


@pytest.mark.parametrize("packed", [False, True])
def test_tokens_and_summaries_on_one_key_axis(packed):
    pattern = patterns.Hierarchical(window=10, spans=(4, 8), reaches=(24,), pooling="mean")
    documents = torch.stack([torch.arange(75) // 23, torch.arange(75) // 75]).to(DEVICE) if packed else None
    layout, mask = tokens_and_summaries(pattern, 75, 16, documents)
    assert layout.keys == 80 + 32 + 16
    check(layout, mask, *tensors(2, 2, 1, 75, layout.keys, 32, torch.float32))


def test_one_layout_serves_a_batch():
    layout = build_layout(PATTERNS["window"], Axis.tokens(40, device=DEVICE), block=16)
    mask = visible_pairs(PATTERNS["window"], 40, 40)[:, None]
    check(layout, mask, *tensors(3, 2, 2, 40, 40, 32, torch.float32))


def test_a_pattern_for_each_kv_head():
    both = [PATTERNS["window_sink"], PATTERNS["strided"], PATTERNS["window_sink"]]
    documents = torch.stack([torch.arange(45) // 20, torch.arange(45) // 45])
    layout = build_layout(both, Axis.tokens(45, documents.to(DEVICE)), block=16)
    mask = torch.stack([visible_pairs(p, 45, 45, documents) for p in both], 1)
    check(layout, mask, *tensors(2, 6, 3, 45, 45, 32, torch.float32))


def test_queries_behind_cached_keys():
    queries, keys = Axis.tokens(20, device=DEVICE, offset=37), Axis.tokens(57, device=DEVICE)
    layout = build_layout(PATTERNS["strided"], queries, keys, block=16)
    mask = visible_pairs(PATTERNS["strided"], 20, 57, offset=37)[:, None]
    check(layout, mask, *tensors(1, 4, 2, 20, 57, 32, torch.float32))


def test_rows_and_columns_that_see_nothing():
    # Queries before all keys (rows without a tile), and with 3 tokens a document rows that are empty within a tile.
    class Late(patterns.Pattern):
        def visible(self, query, key_start, key_end):
            return (query - key_start >= 20) & (query % 3 > 0)

        def candidates(self, query_start, query_stop, length, block):
            return torch.zeros_like(query_start)[..., None], query_stop[..., None]

    layout = build_layout(Late(), Axis.tokens(70, device=DEVICE), block=16)
    mask = visible_pairs(Late(), 70, 70)[:, None]
    assert not mask.any(-1).all() and not mask.any(-2).all()
    _, _, (_, dk, dv) = check(layout, mask, *tensors(1, 2, 1, 70, 70, 32, torch.float32))
    unseen = ~mask[0, 0].any(0)
    assert not dk[:, :, unseen].any() and not dv[:, :, unseen].any()


def test_a_layout_without_any_tile():
    class Nothing(patterns.Dense):
        def visible(self, query, key_start, key_end):
            return key_start > query

    layout = build_layout(Nothing(), Axis.tokens(40, device=DEVICE), block=16)
    check(layout, torch.zeros(1, 1, 40, 40, dtype=torch.bool), *tensors(1, 2, 1, 40, 40, 32, torch.float32))


@pytest.mark.parametrize("scale", [-0.3, 0.0, 1.7])
def test_any_scale(scale):
    layout = build_layout(PATTERNS["window"], Axis.tokens(40, device=DEVICE), block=16)
    mask = visible_pairs(PATTERNS["window"], 40, 40)[:, None]
    q, k, v, grad_out, grad_lse = tensors(1, 2, 1, 40, 40, 32, torch.float32)
    check(layout, mask, q, k, v, grad_out, grad_lse if scale else None, scale=scale, tolerance=1e-5)


def test_large_scores_do_not_overflow():
    layout = build_layout(PATTERNS["window"], Axis.tokens(40, device=DEVICE), block=16)
    mask = visible_pairs(PATTERNS["window"], 40, 40)[:, None]
    q, k, v, grad_out, grad_lse = tensors(1, 2, 1, 40, 40, 32, torch.float32)
    check(layout, mask, q * 30, k * 30, v, grad_out, grad_lse, tolerance=1e-4)


def test_any_strides():
    layout = build_layout(PATTERNS["window"], Axis.tokens(40, device=DEVICE), block=16)
    mask = visible_pairs(PATTERNS["window"], 40, 40)[:, None]
    q, k, v, grad_out, grad_lse = tensors(2, 4, 2, 40, 40, 32, torch.float16)
    as_in_the_model = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v, grad_out)]
    out, _, grads = check(layout, mask, *as_in_the_model, grad_lse)
    plain, _, plain_grads = check(layout, mask, q, k, v, grad_out, grad_lse)
    assert torch.equal(out, plain) and all(torch.equal(a, b) for a, b in zip(grads, plain_grads, strict=True))
    awkward = [t.mT.contiguous().mT for t in (q, k, v)]  # no stride of 1 in the last dimension
    check(layout, mask, *awkward, grad_out[:, :1].expand(-1, 4, -1, -1), grad_lse)


def test_repeats_are_bitwise_equal():
    layout = build_layout(PATTERNS["block_sparse"], Axis.tokens(70, device=DEVICE), block=16)
    q, k, v, grad_out, grad_lse = tensors(1, 2, 1, 70, 70, 32, torch.float16)
    out, lse = backend.forward(q, k, v, layout, 0.2)
    first = backend.backward(grad_out, grad_lse, q, k, v, out, lse, layout, 0.2)
    second = backend.backward(grad_out, grad_lse, q, k, v, out, lse, layout, 0.2)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_unsupported_calls_are_named():
    layout = build_layout(PATTERNS["window"], Axis.tokens(40, device=DEVICE), block=16)
    q, k, v, *_ = tensors(1, 2, 1, 40, 40, 32, torch.float32)
    assert "must be one of" in backend.unsupported(q.double(), k.double(), v.double(), layout)
    assert "32, 64, 96" in backend.unsupported(q[..., :24], k[..., :24], v[..., :24], layout)


def test_every_choice_fits_its_tiles():
    for dtype in backend.common.DTYPES:
        for head_dim in backend.common.HEAD_DIMS:
            for block in (16, 32, 64, 128):
                for kernel in ("forward", "queries", "keys"):
                    config = choose(kernel, dtype, head_dim, block)
                    assert isinstance(config, Config) and block % config.queries == 0 == block % config.keys


@gpu
@needs_cuda
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("head_dim", [32, 64, 96, 128, 192, 256])
def test_on_the_gpu(dtype, head_dim):
    big = {
        "window": patterns.Window(300),
        "block_sparse": patterns.BlockSparse(128, 3, 1, 3),
        "strided": patterns.Strided(200, 384, 128),
    }
    for block in (64, 128):
        for pattern in big.values():
            layout = build_layout(pattern, Axis.tokens(1100, device=DEVICE), block=block)
            mask = visible_pairs(pattern, 1100, 1100)[:, None]
            check(
                layout,
                mask,
                *tensors(1, 4, 2, 1100, 1100, head_dim, dtype),
                tolerance=1e-2 if dtype == torch.bfloat16 else None,
            )


@gpu
@needs_cuda
@pytest.mark.parametrize("block", [64, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_tokens_and_summaries_on_the_gpu(dtype, block):
    pattern = patterns.Hierarchical(window=200, spans=(4, 16), reaches=(500,), pooling="mean")
    documents = torch.stack([torch.arange(1100) // 700, torch.arange(1100) // 1100]).to(DEVICE)
    layout, mask = tokens_and_summaries(pattern, 1100, block, documents)
    tolerance = 1e-2 if dtype == torch.bfloat16 else None
    check(layout, mask, *tensors(2, 8, 2, 1100, layout.keys, 128, dtype), tolerance=tolerance)


@gpu
@needs_cuda
def test_fifty_backward_passes_are_bitwise_equal():
    layout = build_layout(patterns.BlockSparse(128, 3, 1, 3), Axis.tokens(16384, device=DEVICE))
    q, k, v, grad_out, grad_lse = tensors(1, 8, 2, 16384, 16384, 128, torch.bfloat16)
    out, lse = backend.forward(q, k, v, layout, 0.1)
    first = backend.backward(grad_out, grad_lse, q, k, v, out, lse, layout, 0.1)
    for _ in range(49):
        again = backend.backward(grad_out, grad_lse, q, k, v, out, lse, layout, 0.1)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@gpu
@needs_cuda
def test_a_million_tokens_and_more_than_2_31_elements():
    length, heads = 1 << 20, 20
    layout = build_layout(patterns.Window(1024), Axis.tokens(length, device=DEVICE))
    generator = torch.Generator(DEVICE).manual_seed(0)
    make = lambda h: torch.randn(1, h, length, 128, generator=generator, device=DEVICE, dtype=torch.bfloat16)  # noqa: E731
    q, k, v, grad_out = make(heads), make(4), make(4), make(heads)
    assert q.numel() > 2**31
    out, lse = backend.forward(q, k, v, layout, 128**-0.5)
    grads = backend.backward(grad_out, None, q, k, v, out, lse, layout, 128**-0.5)
    assert all(bool(t.isfinite().all()) for t in (out, lse, *grads))
    # The last tokens of the last head, whose addresses are beyond 2^31, against a dense reference.
    start, h = length - 3072, heads - 1
    part = [t[:, -1:, start:] for t in (q, k, v)]
    mask = visible_pairs(patterns.Window(1024), 3072, 3072)[:, None]
    expected = oracle(*part, mask, 128**-0.5, grad_out[:, -1:, start:], torch.zeros(1, 1, 3072, device=DEVICE))
    for got, want in ((out, expected[0]), (grads[0], expected[2])):
        got = got[0, h, start + 1024 :].double()
        assert (got - want[0, 0, 1024:]).norm() / want[0, 0, 1024:].norm() < 1e-2

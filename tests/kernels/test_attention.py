"""attention() against dense masked softmax in float64, forward and backward, on every CPU backend."""

import pytest
import torch

from kernels import Axis, attention, build_layout
from kernels.attention import choose_backends
from kernels.backends import blocked
from kernels.patterns import Dense, Strided, Window
from tests.kernels.layout.test_layout import summaries
from tests.kernels.oracle import PATTERNS, Case, Chosen, assert_same, brute_force_mask, dense_attention, packing

BACKENDS = ("reference", "blocked")

both_backends = pytest.mark.parametrize("backend", BACKENDS)
every_pattern = pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS)


def assert_equals_dense_softmax(case: Case, patterns, queries: Axis, keys: Axis, backend: str, block: int = 16) -> None:
    """out, LSE and every gradient of `case` under the patterns, against brute force."""
    scale = 0.4
    layout = build_layout(patterns, queries, keys, block)
    mask = brute_force_mask(patterns, queries, keys)
    actual = case.run(
        lambda q, k, v, sinks: attention(
            q, k, v, layout, scale=scale, sink_logits=sinks, return_lse=True, backend=backend
        )
    )
    expected = case.run(lambda q, k, v, sinks: dense_attention(q, k, v, mask, scale, sinks))
    assert_same(actual, expected, case.dtype)


@both_backends
@every_pattern
def test_one_ragged_document(pattern, backend):
    axis = Axis.tokens(83)
    assert_equals_dense_softmax(Case(83, 83, batch=2, group=2), pattern, axis, axis, backend)


@both_backends
@every_pattern
def test_a_batch_of_different_packings(pattern, backend):
    axis = Axis.tokens(90, packing([40, 1, 49], [90], [16, 16, 58]))
    assert_equals_dense_softmax(Case(90, 90, batch=3, sinks=False), pattern, axis, axis, backend)


@both_backends
@every_pattern
def test_a_few_queries_behind_cached_keys(pattern, backend):
    queries, keys = Axis.tokens(19, offset=70), Axis.tokens(89)
    assert_equals_dense_softmax(Case(19, 89, group=4), pattern, queries, keys, backend)


@both_backends
@every_pattern
def test_keys_that_are_summaries_of_spans(pattern, backend):
    queries, keys = Axis.tokens(75, packing([50, 25])), summaries([50, 25], span=4)
    case = Case(75, keys.length, batch=2, group=2, sinks=False)
    assert_equals_dense_softmax(case, pattern, queries, keys, backend)


@both_backends
@pytest.mark.parametrize("length", [1, 2, 15, 16, 17, 64, 65])
@pytest.mark.parametrize("block", [16, 32, 64, 128])
def test_lengths_around_every_tile_size(length, block, backend):
    axis = Axis.tokens(length)
    assert_equals_dense_softmax(Case(length, length), Window(9, sink_tokens=2), axis, axis, backend, block)


@both_backends
@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("group", [1, 4, 8])
def test_query_heads_share_kv_heads(group, sinks, backend):
    axis = Axis.tokens(50, packing([20, 30], [45, 5]))
    case = Case(50, 50, batch=2, kv_heads=2, group=group, sinks=sinks)
    assert_equals_dense_softmax(case, Window(11, 3), axis, axis, backend)


@both_backends
@pytest.mark.parametrize("documents", [None, packing([30, 33], [63, 0])], ids=["one_document", "packed"])
def test_one_pattern_per_kv_head(documents, backend):
    axis = Axis.tokens(63, documents)
    patterns = [Window(5), Dense(), Strided(3, 8, 2, "sequence"), Chosen(4)]
    assert_equals_dense_softmax(Case(63, 63, batch=2, kv_heads=4, group=2), patterns, axis, axis, backend)


@both_backends
@pytest.mark.parametrize("sinks", [False, True])
def test_rows_that_see_nothing(sinks, backend):
    axis = Axis.tokens(70)
    assert_equals_dense_softmax(Case(70, 70, group=2, sinks=sinks), Chosen(33), axis, axis, backend)


@both_backends
def test_rows_that_see_nothing_give_zero_and_minus_infinity_and_no_gradient(backend):
    axis = Axis.tokens(40)
    layout = build_layout(Chosen(100), axis, block=16)  # nobody sees anything
    assert not layout.pairs.any()
    q, k, v = (torch.randn(1, 2, 40, 8, requires_grad=True) for _ in range(3))
    out, lse = attention(q, k, v, layout, return_lse=True, backend=backend)
    assert not out.any() and (lse == -torch.inf).all()
    out.sum().backward()
    assert all(not t.grad.any() for t in (q, k, v))


@both_backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("pattern", [Window(20, 3), Dense(), Chosen(5)], ids=["window", "dense", "chosen"])
def test_lower_precisions_lose_a_few_roundings_only(pattern, dtype, backend):
    axis = Axis.tokens(70, packing([33, 37]))
    case = Case(70, 70, group=2, head_dim=16, dtype=dtype)
    assert_equals_dense_softmax(case, pattern, axis, axis, backend)


@both_backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_callers_autocast_rounds_nothing(dtype, backend):
    layout = build_layout(Window(20, 3), Axis.tokens(50), block=16)
    case = Case(50, 50, group=2, dtype=dtype)

    def function(q, k, v, sinks):
        return attention(q, k, v, layout, sink_logits=sinks, return_lse=True, backend=backend)

    def under_autocast(*tensors):
        with torch.autocast("cpu", torch.bfloat16):
            return function(*tensors)

    expected, actual = case.run(function), case.run(under_autocast)
    assert all(torch.equal(actual[name], expected[name]) for name in expected)
    if backend != "reference":  # whose backward pass is autograd's own
        with torch.autocast("cpu", torch.bfloat16):
            actual = case.run(function)
        assert all(torch.equal(actual[name], expected[name]) for name in expected)


@both_backends
@pytest.mark.parametrize(
    "dtype, lse_dtype",
    [(torch.float64, torch.float64), (torch.float32, torch.float32), (torch.bfloat16, torch.float32)],
)
def test_out_has_the_dtype_of_q_and_lse_is_wide(dtype, lse_dtype, backend):
    q = torch.randn(1, 2, 20, 8, dtype=dtype)
    layout = build_layout(Dense(), Axis.tokens(20), block=16)
    out, lse = attention(q, q, q, layout, return_lse=True, backend=backend)
    assert (out.dtype, lse.dtype) == (dtype, lse_dtype) and lse.shape == (1, 2, 20)
    torch.testing.assert_close(attention(q, q, q, layout, backend=backend), out)


@both_backends
def test_strides_do_not_matter(backend):
    """q, k, v as a model makes them (heads behind tokens), as slices of one tensor, and expanded."""
    layout = build_layout(Window(13), Axis.tokens(37), block=16)
    generator = torch.Generator().manual_seed(1)
    fused = torch.randn(2, 37, 4 + 2 + 2, 8, generator=generator, dtype=torch.float64)
    q, k, v = (t.transpose(1, 2) for t in fused.split([4, 2, 2], 2))
    v = v[:1, :, :, :1].expand(2, 2, 37, 8)
    assert not q.is_contiguous() and not v.is_contiguous()

    def run(*tensors):
        leaves = [t.detach().requires_grad_() for t in tensors]
        out, lse = attention(*leaves, layout, return_lse=True, backend=backend)
        return [out, lse, *torch.autograd.grad(out.square().sum() + lse.sum(), leaves)]

    for strided, contiguous in zip(run(q, k, v), run(*(t.contiguous() for t in (q, k, v))), strict=True):
        torch.testing.assert_close(strided, contiguous, rtol=0, atol=1e-12)


@both_backends
def test_the_default_scale_is_one_over_the_root_of_head_dim(backend):
    q = torch.randn(1, 1, 20, 16, generator=torch.Generator().manual_seed(0))
    layout = build_layout(Dense(), Axis.tokens(20), block=16)
    assert torch.equal(
        attention(q, q, q, layout, backend=backend), attention(q, q, q, layout, scale=0.25, backend=backend)
    )


@both_backends
def test_large_scores_do_not_overflow(backend):
    q = torch.full((1, 1, 20, 16), 100.0)
    layout = build_layout(Window(7), Axis.tokens(20), block=16)
    v = torch.randn(1, 1, 20, 16, generator=torch.Generator().manual_seed(0))
    out, lse = attention(q, q, v, layout, scale=1.0, return_lse=True, backend=backend)
    mean_of_seen = torch.stack([v[0, 0, max(0, i - 6) : i + 1].mean(0) for i in range(20)])
    torch.testing.assert_close(out[0, 0], mean_of_seen)
    assert lse.isfinite().all()


@both_backends
def test_gradcheck(backend):
    layout = build_layout([Window(3), Chosen(2)], Axis.tokens(18, packing([7, 11])), block=16)
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()  # noqa: E731
    q, k, v, sinks = draw(1, 4, 18, 2), draw(1, 2, 18, 2), draw(1, 2, 18, 2), draw(4)
    call = lambda q, k, v, sinks: attention(  # noqa: E731
        q, k, v, layout, sink_logits=sinks, return_lse=True, backend=backend
    )
    assert torch.autograd.gradcheck(call, (q, k, v, sinks))


def test_pieces_of_any_size_give_the_same(monkeypatch):
    """The blocked backend cuts its work by cache size: results must not depend on it."""
    axis = Axis.tokens(80, packing([50, 30]))
    for scores_at_once in (1, 1 << 12):
        monkeypatch.setattr(blocked, "SCORES_PER_CHUNK", scores_at_once)
        assert_equals_dense_softmax(Case(80, 80, batch=2, group=2), PATTERNS["strided"], axis, axis, "blocked")


def test_blocked_gathers_listed_tiles_only(monkeypatch):
    """Work is O(tiles): the key blocks that it reads are as many as the layout lists."""
    layout = build_layout(Window(20), Axis.tokens(640), block=16)
    read = []
    gather = blocked._Blocked.gather
    monkeypatch.setattr(
        blocked._Blocked, "gather", lambda s, b, piece: read.append(piece.key_blocks.numel()) or gather(s, b, piece)
    )
    q = torch.randn(1, 1, 640, 8)
    attention(q, q, q, layout, backend="blocked")
    assert sum(read) == 2 * int(layout.rows.count.sum()) < 0.2 * 2 * 40**2  # once for keys, once for values


def test_blocked_is_deterministic():
    axis = Axis.tokens(90)
    layout, case = build_layout(PATTERNS["fixed"], axis, block=16), Case(90, 90, group=4, dtype=torch.float32)
    run = lambda: case.run(lambda q, k, v, s: attention(q, k, v, layout, sink_logits=s, return_lse=True))  # noqa: E731
    first, second = run(), run()
    assert all(torch.equal(first[name], second[name]) for name in first)


# Impossible requests


def call(q=(2, 4, 20, 8), k=(2, 2, 20, 8), v=None, layout=None, dtypes=(torch.float32,) * 3, **arguments):
    tensors = [torch.zeros(shape, dtype=dtype) for shape, dtype in zip((q, k, v or k), dtypes, strict=True)]
    return attention(*tensors, layout or build_layout(Dense(), Axis.tokens(20), block=16), **arguments)


IMPOSSIBLE = {
    "3 dimensions": (dict(q=(4, 20, 8)), "q, k, v have 3, 4, 4 dimensions: must be 4 each"),
    "v differs": (dict(v=(2, 2, 20, 4)), r"k \(2, 2, 20, 8\) and v \(2, 2, 20, 4\): must have the same shape"),
    "batch": (dict(k=(3, 2, 20, 8)), "k has batch 3: must be q's, 2"),
    "head_dim": (dict(k=(2, 2, 20, 4)), "k has head_dim 4: must be q's, 8"),
    "heads": (dict(k=(2, 3, 20, 8)), "q has 4 heads: must be a multiple of the 3 KV heads"),
    "dtypes": (
        dict(dtypes=(torch.float32, torch.bfloat16, torch.float32)),
        "torch.float32, torch.bfloat16, torch.float32: must have the same dtype",
    ),
    "integers": (dict(dtypes=(torch.int64,) * 3), "q is torch.int64: must be floating point"),
    "queries": (dict(q=(2, 4, 19, 8)), "q has 19 queries: must be the layout's, 20"),
    "keys": (dict(k=(2, 2, 21, 8)), "k has 21 keys: must be the layout's, 20"),
    "layout's batch": (
        dict(layout=build_layout(Dense(), Axis.tokens(20, torch.zeros(3, 20)), block=16)),
        "the layout has batch 3: must be 1 or q's, 2",
    ),
    "layout's heads": (
        dict(layout=build_layout([Dense(), Window(1), Window(2), Window(3)], Axis.tokens(20), block=16)),
        "the layout has 4 heads: must be 1 or k's, 2",
    ),
    "layout's device": (
        dict(q=(2, 4, 20, 8), layout=build_layout(Dense(), Axis.tokens(20), block=16), device="meta"),
        "q is on meta, the layout on cpu: must be on the same device",
    ),
    "sink_logits": (dict(sink_logits=torch.zeros(2)), r"sink_logits \(2,\): must be \[4\]"),
    "backend": (dict(backend="fast"), "backend='fast': must be one of auto, reference, .*blocked"),
}


@pytest.mark.parametrize("arguments, message", IMPOSSIBLE.values(), ids=IMPOSSIBLE)
def test_an_impossible_call_says_what_is_possible(arguments, message):
    arguments = dict(arguments)
    with torch.device(arguments.pop("device", "cpu")), pytest.raises(ValueError, match=message):
        call(**arguments)


def test_a_backend_that_cannot_serve_is_refused_with_its_reason(monkeypatch):
    monkeypatch.setattr(blocked, "unsupported", lambda *_: "it takes no Mondays")
    with pytest.raises(ValueError, match="backend='blocked' cannot serve this call: it takes no Mondays"):
        call(backend="blocked")


def test_blocked_takes_floating_point_only():
    layout = build_layout(Dense(), Axis.tokens(20), block=16)
    q = torch.zeros(1, 1, 20, 8)
    assert blocked.unsupported(q, q, q, layout) is None
    assert "torch.int8" in blocked.unsupported(q.to(torch.int8), q, q, layout)


def test_auto_takes_blocked_on_a_cpu_and_a_named_backend_is_never_exchanged():
    q, layout = torch.zeros(1, 1, 20, 8), build_layout(Dense(), Axis.tokens(20), block=16)
    assert choose_backends(q, q, q, layout) == ("blocked", "blocked")
    assert [choose_backends(q, q, q, layout, name) for name in BACKENDS] == [(name, name) for name in BACKENDS]


@pytest.mark.parametrize("name", ["flex", "flash"])
def test_a_gpus_backend_is_refused_on_a_cpu(name):
    with pytest.raises(ValueError, match=f"backend='{name}' cannot serve this call: device cpu: must be cuda"):
        call(backend=name)

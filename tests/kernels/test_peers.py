"""Backends for GPUs, ours and the peers': the same masks on the CPU, the same numbers on a GPU."""

import dataclasses
import importlib
import itertools
import types

import pytest
import torch

from kernels import Axis, attention, build_layout
from kernels.attention import choose_backends
from kernels.backends import flash, flex, reference
from kernels.patterns import BlockSparse, Dense, Dilated, Fixed, Hierarchical, Strided, Window
from kernels.patterns.hierarchical import Summaries
from kernels.summaries.hierarchy import build_hierarchy
from tests.kernels.oracle import PATTERNS, Chosen, brute_force_mask, packing

gpu = pytest.mark.gpu
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
needs_flash = pytest.mark.skipif(
    not (torch.cuda.is_available() and flash.installed()), reason="needs a CUDA device and the package flash-attn-4"
)


def says(layout, group: int, heads: int) -> torch.Tensor:
    """FlexAttention's mask function on all pairs, booleans `[batch, heads, queries, keys]`."""
    batch = layout.batch
    index = [torch.arange(n) for n in (batch, heads, layout.queries, layout.keys)]
    grid = torch.meshgrid(*index, indexing="ij")
    return flex.mask_mod(layout.source, group)(*grid).expand(grid[0].shape)


@pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS)
@pytest.mark.parametrize("packed", [None, packing([30, 11, 19], [60, 0, 0])], ids=["one_document", "packed"])
def test_flex_is_told_the_truth(pattern, packed):
    axis = Axis.tokens(60, packed)
    layout = build_layout(pattern, axis, block=16)
    truth = brute_force_mask(pattern, axis)
    assert torch.equal(says(layout, 2, 4), truth.expand(-1, 4, -1, -1))
    assert torch.equal(
        flex.block_mask(layout, 2).to_dense()[:, 0].bool(),
        torch.nn.functional.pad(truth[:, 0], (0, 4, 0, 4)).unflatten(2, (4, 16)).unflatten(1, (4, 16)).any(4).any(2),
    )


def test_flex_is_told_of_each_kv_head():
    per_head = [Window(5), Chosen(7), Window(5)]
    axis = Axis.tokens(40, packing([15, 25]))
    layout = build_layout(per_head, axis, block=16)
    assert torch.equal(says(layout, 2, 6), brute_force_mask(per_head, axis).repeat_interleave(2, 1))
    mask = flex.block_mask(layout, 2)
    assert mask.kv_num_blocks.shape[:2] == (1, 6)
    assert torch.equal(mask.kv_num_blocks + mask.full_kv_num_blocks, layout.rows.count.repeat_interleave(2, 1))


@pytest.mark.parametrize("packed", [None, packing([30, 11, 19], [60, 0, 0])], ids=["one_document", "packed"])
def test_flex_is_told_of_tokens_and_summaries(packed):
    pattern = Hierarchical(window=5, spans=(4, 8), reaches=(13,), pooling="mean")
    layout = build_hierarchy(pattern, Axis.tokens(60, packed), 16).layout
    assert torch.equal(says(layout, 2, 2), layout.dense_mask().expand(-1, 2, -1, -1))


def test_flex_is_told_of_queries_behind_cached_keys():
    queries, keys = Axis.tokens(20, offset=37), Axis.tokens(57)
    layout = build_layout(Strided(10, 24, 3), queries, keys, block=16)
    assert torch.equal(says(layout, 1, 1), brute_force_mask(Strided(10, 24, 3), queries, keys))


def test_flex_is_told_of_keys_that_are_no_plain_tokens():
    tokens = Axis.tokens(62)
    layout = build_layout(Summaries(4), tokens, Axis.summaries(tokens, 4), block=16)
    assert torch.equal(says(layout, 1, 1), layout.dense_mask()) and layout.dense_mask().any()
    later = build_layout(Window(9), Axis.tokens(6, offset=20), Axis.tokens(12, offset=14), block=16)
    assert torch.equal(says(later, 1, 1), later.dense_mask()) and later.window is None
    assert build_layout(Dense(), Axis.summaries(tokens, 4), tokens, block=16).window is None


def test_a_plain_window_is_recognized_and_nothing_else():
    axis, packed = Axis.tokens(100), Axis.tokens(100, packing([40, 60]))
    window = lambda pattern, *axes: build_layout(pattern, *(axes or (axis,)), block=16).window  # noqa: E731
    assert (window(Dense()), window(Window(7)), window([Window(7), Window(7)])) == (100, 7, 7)
    assert window(Window(7), Axis.tokens(20, offset=80), axis) == 7, "queries up to the last key"
    assert window(Window(7), Axis.tokens(20, offset=50), axis) is None, "keys beyond the last query"
    assert window(Window(7, sink_tokens=1)) is window([Window(7), Dense()]) is window(Window(7), packed) is None
    for pattern in (Dilated(7, 1), Strided(7, 50), Fixed(50, 3), BlockSparse(16, 2, 0, 0)):
        assert window(pattern) is None


def test_what_a_backend_cannot_do_is_named(monkeypatch):
    layout = build_layout(Strided(7, 50), Axis.tokens(100), block=16)
    q = torch.zeros(1, 1, 100, 64, dtype=torch.bfloat16)
    assert flash.unsupported(q, q, q, layout) == flex.unsupported(q, q, q, layout) == "device cpu: must be cuda"

    class OnCuda:
        is_cuda, device, shape, dtype = True, torch.device("cuda"), q.shape, q.dtype

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    assert flash.missing(OnCuda) == "compute capability 8.6: must be 9.x or 10.x"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(flash, "installed", lambda: False)
    assert "flash-attn-4 is not installed" in flash.unsupported(OnCuda, q, q, layout)
    monkeypatch.setattr(flash, "installed", lambda: True)
    assert "must be full attention, or a window without sink tokens" in flash.unsupported(OnCuda, q, q, layout)
    assert "block 16: must be 128" in flex.unsupported(OnCuda, q, q, layout)
    coarse = build_layout(Strided(7, 50), Axis.tokens(100))
    assert flex.unsupported(OnCuda, q, q, coarse) is None
    assert "must come from build_layout" in flex.unsupported(OnCuda, q, q, dataclasses.replace(coarse, source=None))
    OnCuda.shape = (1, 1, 100, 80)
    assert "head_dim 80: must be one of 64, 128" in flex.unsupported(OnCuda, q, q, coarse)
    OnCuda.dtype = torch.float32
    assert "dtype torch.float32: must be one of torch.bfloat16" in flash.unsupported(OnCuda, q, q, coarse)


def test_whether_it_is_installed_is_a_constant_to_the_compiler():
    """A compiled layer chooses its backend while it is traced."""
    chosen = torch.compile(lambda x: x + 1 if flash.installed() else x + 2, fullgraph=True, backend="eager")
    assert chosen(torch.zeros(1)) == (1 if flash.installed() else 2)


@pytest.mark.parametrize(
    ("pattern", "length", "on_hopper", "elsewhere"),
    [
        (Dense(), 4096, ("hopper", "hopper"), ("flash", "flash")),
        (Dense(), 32768, ("flash", "flash"), ("flash", "flash")),
        (Dense(), 65536, ("flash", "hopper"), ("flash", "triton")),
        (Window(1024), 65536, ("hopper", "hopper"), ("flash", "flash")),
        (Window(512), 4096, ("hopper", "hopper"), ("triton", "triton")),
        (Window(2048, sink_tokens=1), 4096, ("hopper", "hopper"), ("triton", "triton")),
        (Strided(64, 2048, 128), 4096, ("hopper", "hopper"), ("triton", "triton")),
    ],
    ids=str,
)
def test_auto_takes_each_pass_from_where_it_was_fastest(pattern, length, on_hopper, elsewhere, monkeypatch):
    class OnCuda:
        is_cuda = True

    serves = types.SimpleNamespace(unsupported=lambda *_: None)
    refuses = types.SimpleNamespace(unsupported=lambda *_: "must be another GPU, or a package is not installed")
    layout = build_layout(pattern, Axis.tokens(length))
    module = importlib.import_module("kernels.attention")  # the name in the package is the function
    monkeypatch.setattr(module.dispatch, "has_triton", lambda: True)

    def chosen(*refusing: str) -> tuple[str, str]:
        monkeypatch.setattr(module, "_module", lambda name: refuses if name in refusing else serves)
        return choose_backends(OnCuda, OnCuda, OnCuda, layout)

    assert chosen() == on_hopper
    assert chosen("hopper") == elsewhere
    assert chosen("flash") == ("hopper", "hopper")
    assert chosen("flash", "hopper") == ("triton", "triton")


# On a GPU

LENGTH = 700
BIG = {
    "dense": Dense(),
    "window": Window(300),
    "window_with_sinks": Window(200, sink_tokens=5),
    "dilated": Dilated(60, 4),
    "strided": Strided(200, 384, 128),
    "strided_by_sequence": Strided(100, 256, 20, align="sequence"),
    "fixed": Fixed(256, 32),
    "block_sparse": BlockSparse(128, 2, 1, 2),
}
DOCUMENTS = packing([333, 1, 366], [700, 0, 0])


def compare(backend: str, layout, head_dim: int, dtype: torch.dtype, group: int) -> None:
    """Output, log-sum-exp and gradients against float64, no worse than 1.5 times a dense softmax in `dtype`."""
    generator = torch.Generator("cuda").manual_seed(0)
    draw = lambda heads: torch.randn(2, LENGTH, heads, head_dim, device="cuda", generator=generator)  # noqa: E731
    q, k, v, grad = (draw(h).to(dtype).transpose(1, 2) for h in (2 * group, 2, 2, 2 * group))
    grad_lse = torch.randn(q.shape[:3], device="cuda", generator=generator)
    mask, scale = layout.dense_mask(), head_dim**-0.5

    def gradients(function, *tensors):
        tensors = [t.detach().requires_grad_() for t in tensors]
        out, lse = function(*tensors)
        return [out, *torch.autograd.grad((out, lse), tensors, (grad.to(out.dtype), grad_lse.to(lse.dtype))), lse]

    def rounded(q, k, v):
        """A dense softmax whose products are rounded to `dtype`, as any kernel's are."""
        keys, values = (t.repeat_interleave(group, 1) for t in (k, v))
        scores = (q @ keys.mT).float() * scale
        scores = scores.masked_fill(~mask.repeat_interleave(2 * group // mask.shape[1], 1), -torch.inf)
        return scores.softmax(-1).to(dtype) @ values, scores.logsumexp(-1)

    truth = gradients(lambda *t: reference.masked_attention(*t, mask, scale), *(t.double() for t in (q, k, v)))
    usual = gradients(rounded, q, k, v)

    ours = gradients(lambda *t: attention(*t, layout, return_lse=True, backend=backend), q, k, v)
    for name, got, typical, want in zip(("out", "dq", "dk", "dv", "lse"), ours, usual, truth, strict=True):
        error, bar = ((x.double() - want).norm() / want.norm() for x in (got, typical))
        assert error <= max(1.5 * bar, 1e-5), f"{name}: {error:.1e}, a rounded dense softmax {bar:.1e}"


FACTORS = {
    "backend": ["triton", "hopper", "flex", "flash"],
    "pattern": list(BIG),
    "dtype": ["bfloat16", "float16", "float32"],
    "head_dim": [64, 128, 256],
    "group": [1, 4],
    "packed": [False, True],
}


def possible(backend: str, pattern: str, dtype: str, head_dim: int, group: int, packed: bool) -> bool:
    """What each backend offers; the backends themselves refuse the rest."""
    if backend == "triton":
        return True
    if dtype == "float32" or head_dim == 256:
        return False
    return backend != "flash" or (pattern in ("dense", "window") and not packed)


def all_pairs() -> list[tuple]:
    """Few combinations in which every possible pair of two factors' values occurs."""
    combinations = [c for c in itertools.product(*FACTORS.values()) if possible(*c)]
    pairs_of = {c: set(itertools.combinations(enumerate(c), 2)) for c in combinations}
    missing, chosen = set().union(*pairs_of.values()), []
    while missing:
        chosen.append(max(combinations, key=lambda c: len(pairs_of[c] & missing)))
        missing -= pairs_of[chosen[-1]]
    return sorted(chosen)


def test_the_sample_holds_all_pairs_and_the_backends_refuse_the_rest():
    sample = all_pairs()
    assert len(sample) < 60
    assert {c[0] for c in sample} == set(FACTORS["backend"])
    for backend, pattern in itertools.product(FACTORS["backend"], FACTORS["pattern"]):
        if any(possible(backend, pattern, *rest) for rest in itertools.product(*list(FACTORS.values())[2:])):
            assert any(c[:2] == (backend, pattern) for c in sample)


@gpu
@needs_cuda
@pytest.mark.parametrize(("backend", "pattern", "dtype", "head_dim", "group", "packed"), all_pairs())
def test_all_pairs_on_the_gpu(backend, pattern, dtype, head_dim, group, packed):
    if "flash" in backend and not flash.installed():
        pytest.skip("needs the package flash-attn-4")
    layout = build_layout(BIG[pattern], Axis.tokens(LENGTH, DOCUMENTS.cuda() if packed else None, device="cuda"))
    compare(backend, layout, head_dim, getattr(torch, dtype), group)


@gpu
@needs_cuda
def test_twenty_patterns_in_one_process_stay_compiled():
    for width in range(20, 40):
        layout = build_layout(Window(width), Axis.tokens(LENGTH, device="cuda"))
        compare("flex", layout, 64, torch.bfloat16, 1)


@gpu
@needs_flash
def test_flash_gives_the_same_gradients_every_time():
    layout = build_layout(Dense(), Axis.tokens(8192, device="cuda"))
    q, k, v = (torch.randn(1, h, 8192, 128, device="cuda", dtype=torch.bfloat16, requires_grad=True) for h in (8, 2, 2))

    def gradients():
        return torch.autograd.grad(attention(q, k, v, layout, backend="flash").float().square().sum(), (q, k, v))

    first = gradients()
    for _ in range(19):
        assert all(torch.equal(a, b) for a, b in zip(gradients(), first, strict=True))

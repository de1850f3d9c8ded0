"""Hopper's kernels beside Triton's, which have the same lists and masks, and beside themselves. (test_peers.py holds
them against a softmax in float64.)"""

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from kernels import Axis, attention, build_layout
from kernels.backends import hopper
from kernels.backends.hopper.backward_queries import grad_queries
from kernels.backends.triton.dense.backward import compute_row_stats
from kernels.layout.block_layout import FULL, BlockLayout
from kernels.layout.builder import list_tiles
from kernels.patterns import BlockSparse, Dense, Hierarchical, Strided, Window
from kernels.summaries.hierarchy import build_hierarchy
from tests.kernels.oracle import Chosen, packing

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="needs a Hopper GPU"
    ),
]


def tokens(length, documents=None):
    return Axis.tokens(length, documents, device="cuda")


LAYOUTS = {
    "queries without keys": lambda: build_layout(Chosen(333), tokens(900)),
    "nothing at all": lambda: build_layout(Chosen(10_000), tokens(300)),
    "one pattern per head": lambda: build_layout([Dense(), Strided(200, 384, 128)], tokens(900)),
    "cached keys": lambda: build_layout(Window(300), Axis.tokens(200, offset=1100, device="cuda"), tokens(1300)),
    "one query": lambda: build_layout(Dense(), Axis.tokens(1, offset=399, device="cuda"), tokens(400)),
    "packed documents": lambda: build_layout(Window(300, 4), tokens(1000, packing([333, 1, 666], [1000, 0, 0]).cuda())),
    "split columns": lambda: build_layout(BlockSparse(128, 2, 1, 2), tokens(16384)),
    "tokens and summaries": lambda: build_hierarchy(
        Hierarchical(window=64, spans=(16, 64), reaches=(512,), pooling="mean"), tokens(1000), 128
    ).layout,
}  # fmt: skip


def draw(layout, batch, heads, kv_heads, head_dim, dtype, seed=0):
    """q, k, v and the gradients of the output and the log-sum-exp, with heads behind tokens as in a model."""
    generator = torch.Generator("cuda").manual_seed(seed)
    sizes = ((heads, layout.queries), (kv_heads, layout.keys), (kv_heads, layout.keys), (heads, layout.queries))
    made = [
        torch.randn(batch, n, h, head_dim, device="cuda", generator=generator).to(dtype).transpose(1, 2)
        for h, n in sizes
    ]
    return *made, torch.randn(batch, heads, layout.queries, device="cuda", generator=generator)


def results(backend, layout, q, k, v, grad, grad_lse, scale=None):
    leaves = [t.detach().requires_grad_() for t in (q, k, v)]
    out, lse = attention(*leaves, layout, scale=scale, return_lse=True, backend=backend)
    seen = lse > -torch.inf
    grads = torch.autograd.grad((out, torch.where(seen, lse, 0.0)), leaves, (grad, grad_lse))
    return {"out": out, "lse": lse, "dq": grads[0], "dk": grads[1], "dv": grads[2]}


def assert_close(ours, theirs, tolerance=4e-3):
    """Equal up to the rounding of weights to 16 bits, which differs by the order of sums."""
    for name, got in ours.items():
        want = theirs[name]
        hidden = want == -torch.inf
        assert torch.equal(got == -torch.inf, hidden), name
        got, want = (t.float().masked_fill(hidden, 0.0) for t in (got, want))
        error = (got - want).norm() / want.norm().clamp(min=1e-3)
        assert error < (1e-5 if name == "lse" else tolerance), f"{name}: {error:.1e}"


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("make", LAYOUTS.values(), ids=LAYOUTS)
def test_the_results_are_those_of_triton(make, head_dim):
    layout = make()
    tensors = draw(layout, 2, 4, 2, head_dim, torch.bfloat16)
    assert_close(results("hopper", layout, *tensors), results("triton", layout, *tensors))


@pytest.mark.parametrize("with_grad_lse", [True, False])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("make", LAYOUTS.values(), ids=LAYOUTS)
def test_the_kernel_of_dq_writes_the_statistics_of_all_rows(make, head_dim, with_grad_lse):
    layout = make()
    q, k, v, grad, grad_lse = draw(layout, 2, 4, 2, head_dim, torch.float16)
    grad_lse = grad_lse if with_grad_lse else None
    out, lse = hopper.forward(q, k, v, layout, 0.1)
    want = compute_row_stats(grad, grad_lse, out, lse, 128)
    nan = torch.full_like(want, torch.nan)
    del nan  # its memory is that of the next tensor of this size: what the kernel does not write stays NaN
    _, got = grad_queries(grad, grad_lse, q, k, v, out, lse, layout, 0.1)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_a_negative_scale_and_contiguous_tensors():
    layout = build_layout(Window(200), tokens(500))
    tensors = [t.contiguous() for t in draw(layout, 1, 2, 2, 128, torch.float16)]
    assert_close(results("hopper", layout, *tensors, scale=-0.2), results("triton", layout, *tensors, scale=-0.2))


@pytest.mark.alone
def test_a_million_tokens_and_more_than_2_31_elements():
    layout = build_layout(Window(1024), tokens(1 << 20))
    tensors = draw(layout, 1, 20, 4, 128, torch.bfloat16)
    assert tensors[0].numel() > 2**31
    ours, theirs = (results(backend, layout, *tensors) for backend in ("hopper", "triton"))
    # Of the last head, whose addresses are beyond 2^31 in out and dq.
    assert_close({name: t[:, -1] for name, t in ours.items()}, {name: t[:, -1] for name, t in theirs.items()})


def random_layout(generator: np.random.Generator, batch: int, heads: int) -> BlockLayout:
    """Lists of random density, with rows and columns that are empty or full, and random masks, of `batch` x `heads`."""
    length = int(generator.integers(1, 1200))
    blocks = -(-length // 128)
    shape = (batch * heads, blocks, blocks)
    live = generator.random(shape) < generator.uniform(0, 1, (batch * heads, 1, 1))
    live[generator.integers(batch * heads), generator.integers(blocks)] = False
    live[generator.integers(batch * heads), :, generator.integers(blocks)] = True
    bits = generator.random((8, 128, 128)) < generator.uniform(0.01, 1, (8, 1, 1))
    tile = generator.integers(0, len(bits), shape)
    inner = np.arange(blocks) < length // 128  # blocks at the end are cut, and are masked
    full = (generator.random(shape) < generator.uniform()) & inner[:, None] & inner
    group, row, column = (torch.from_numpy(index).cuda() for index in live.nonzero())
    tile = torch.from_numpy(np.where(full, FULL, tile)[live]).cuda()
    # Rows and columns beyond the end are invisible: masks of the last block hide them.
    tail = bits.copy()
    tail[:, length - 128 * (blocks - 1) :] = tail[:, :, length - 128 * (blocks - 1) :] = False
    at_end = (row == blocks - 1) | (column == blocks - 1)
    tile = torch.where(at_end & (tile != FULL), tile + len(bits), tile)
    packed = np.packbits(np.concatenate([bits, tail]), axis=-1, bitorder="little").view(np.int32)
    lists_shape, all_heads = (batch, heads, blocks, blocks), range(heads)
    return BlockLayout(
        queries=length,
        keys=length,
        block=128,
        rows=list_tiles(group, row, column, tile, None, lists_shape, all_heads),
        columns=list_tiles(group, column, row, tile, None, lists_shape, all_heads),
        masks=torch.from_numpy(packed.copy()).view(-1, 128, 4).cuda(),
        pairs=torch.ones(batch, heads, dtype=torch.int64, device="cuda"),
    )


@pytest.mark.parametrize("head_dim", [64, 128])
def test_ten_thousand_random_layouts(head_dim):
    generator = np.random.default_rng(head_dim)
    for seed in range(157):  # of 32 layouts, for each head_dim
        layout = random_layout(generator, batch=8, heads=4)
        tensors = draw(layout, 8, 8, 4, head_dim, torch.bfloat16, seed)
        assert_close(results("hopper", layout, *tensors), results("triton", layout, *tensors), 6e-3)


@pytest.mark.parametrize("make", [LAYOUTS["split columns"], LAYOUTS["packed documents"]])
def test_a_hundred_repeats_give_the_same_bits(make):
    layout = make()
    tensors = draw(layout, 2, 8, 2, 128, torch.bfloat16)
    first = results("hopper", layout, *tensors)
    for _ in range(99):
        again = results("hopper", layout, *tensors)
        assert all(torch.equal(again[name], first[name]) for name in first)


def test_what_it_cannot_serve_is_named():
    layout = build_layout(Dense(), tokens(300))
    q = torch.zeros(1, 1, 300, 96, device="cuda", dtype=torch.bfloat16)
    assert "head_dim 96: must be one of 64, 128" in hopper.unsupported(q, q, q, layout)
    q = q[..., :64]
    assert hopper.unsupported(q, q, q, layout) is None
    assert "torch.float32: must be one of torch.bfloat16" in hopper.unsupported(q.float(), q, q, layout)
    assert "block 64: must be 128" in hopper.unsupported(q, q, q, build_layout(Dense(), tokens(300), block=64))

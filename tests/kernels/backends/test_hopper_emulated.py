"""Hopper's kernels on a CPU, in gluon_emulator.py, against a softmax in float64: what they compute, and that they wait
for it. (test_hopper.py runs them on a GPU.)"""

import importlib

import pytest
import torch

pytest.importorskip("triton")

from kernels import Axis, build_layout
from kernels.backends import hopper, reference
from kernels.backends.hopper.backward_queries import grad_queries
from kernels.backends.triton.dense import work
from kernels.patterns import BlockSparse, Dense, Hierarchical, Strided, Window
from kernels.summaries.hierarchy import build_hierarchy
from tests.kernels.backends.gluon_emulator import Barrier, Deadlock, Scheduler, emulated
from tests.kernels.oracle import Chosen, packing

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="is for CPUs: test_hopper.py runs on a GPU")

MODULES = [
    importlib.import_module(f"kernels.backends.hopper.{name}")
    for name in ("common", "forward", "backward_queries", "backward_keys")
]
KERNELS = ("_forward", "_grad_queries", "_grad_keys")

LAYOUTS = {
    "packed documents": lambda: build_layout(Window(150, 4), Axis.tokens(300, packing([130, 1, 169]))),
    "sequences of other documents": lambda: build_layout(Dense(), Axis.tokens(200, packing([130, 70], [200, 0]))),
    "queries without keys": lambda: build_layout(Chosen(140), Axis.tokens(400)),
    "nothing at all": lambda: build_layout(Chosen(10_000), Axis.tokens(150)),
    "one pattern per head": lambda: build_layout([Dense(), Strided(40, 96, 16)], Axis.tokens(300)),
    "cached keys": lambda: build_layout(Window(90), Axis.tokens(70, offset=330), Axis.tokens(400)),
    "split columns": lambda: build_layout(BlockSparse(128, 1, 1, 0), Axis.tokens(640)),
    "fixed sizes": lambda: build_layout(Window(150), Axis.tokens(300, packing([130, 170])), fixed=True),
    "tokens and summaries": lambda: build_hierarchy(
        Hierarchical(window=64, spans=(16,), reaches=(), pooling="mean"), Axis.tokens(300), 128
    ).layout,
}  # fmt: skip


@pytest.fixture(autouse=True)
def _unwritten_memory_holds_nan():
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def draw(layout, head_dim: int, dtype: torch.dtype, batch: int, kv_heads: int = 2, group: int = 2):
    """q, k, v and the gradients of the output and the log-sum-exp, with heads behind tokens as in a model."""
    generator = torch.Generator().manual_seed(0)
    sizes = ((2 * group, layout.queries), (kv_heads, layout.keys), (kv_heads, layout.keys), (2 * group, layout.queries))
    tensors = [
        torch.randn(batch, n, heads, head_dim, generator=generator).to(dtype).transpose(1, 2) for heads, n in sizes
    ]
    return *tensors, torch.randn(batch, 2 * group, layout.queries, generator=generator)


def exact(layout, q, k, v, grad, grad_lse, scale):
    """{name: value} in float64; log-sum-exps of queries without keys have no gradient."""
    leaves = [t.double().requires_grad_() for t in (q, k, v)]
    out, lse = reference.masked_attention(*leaves, layout.dense_mask(), scale)
    seen = torch.where(lse == -torch.inf, 0.0, lse)
    grads = torch.autograd.grad((out, seen), leaves, (grad.double(), grad_lse.double()))
    return dict(zip(("out", "lse", "dq", "dk", "dv"), (out.detach(), lse.detach(), *grads), strict=True))


@pytest.mark.parametrize(
    ("name", "head_dim", "dtype", "scale"),
    [
        *((name, 64, torch.float16, 0.1) for name in LAYOUTS),
        ("packed documents", 128, torch.bfloat16, 0.1),
        ("one pattern per head", 128, torch.float16, -0.1),
    ],
)
def test_the_results_are_exact(name, head_dim, dtype, scale, monkeypatch):
    layout = LAYOUTS[name]()
    if name == "split columns":
        monkeypatch.setattr(work, "longest_chunk", lambda tiles, device: 2)
        assert work.plan_of(layout).columns(1, 2).buffers > 0
    q, k, v, grad, grad_lse = draw(layout, head_dim, dtype, batch=layout.batch)
    with emulated(*MODULES, kernels=KERNELS, programs=3):
        out, lse = hopper.forward(q, k, v, layout, scale)
        grads = hopper.backward(grad, grad_lse, q, k, v, out, lse, layout, scale)
    truth = exact(layout, q, k, v, grad, grad_lse, scale)
    for key, got in zip(truth, (out, lse, *grads), strict=True):
        hidden = truth[key] == -torch.inf
        assert torch.equal(got == -torch.inf, hidden), key
        got, want = (t.double().masked_fill(hidden, 0.0) for t in (got, truth[key]))
        bar = 1e-5 if key == "lse" else 1e-2 if dtype == torch.bfloat16 else 1.5e-3
        assert (got - want).norm() <= bar * want.norm(), key


@pytest.mark.parametrize("with_grad_lse", [True, False])
def test_the_kernel_of_dq_writes_the_statistics_of_all_rows(with_grad_lse):
    layout = LAYOUTS["queries without keys"]()
    q, k, v, grad, grad_lse = draw(layout, 64, torch.float16, batch=2)
    with emulated(*MODULES, kernels=KERNELS, programs=2):
        out, lse = hopper.forward(q, k, v, layout, 0.1)
        _, stats = grad_queries(grad, grad_lse if with_grad_lse else None, q, k, v, out, lse, layout, 0.1)
    delta = (out.float() * grad.float()).sum(-1) - (grad_lse if with_grad_lse else 0.0)
    seen = lse > -torch.inf
    torch.testing.assert_close(stats[:, :, 0, :400], torch.where(seen, lse * 1.4426950408889634, torch.inf))
    torch.testing.assert_close(stats[:, :, 1, :400], torch.where(seen, delta, 0.0), rtol=1e-4, atol=1e-4)
    assert torch.isposinf(stats[:, :, 0, 400:]).all() and (stats[:, :, 1, 400:] == 0).all(), "rows beyond the end"


def test_every_order_of_roles_and_copies_gives_the_same_bits():
    layout = LAYOUTS["packed documents"]()
    tensors = q, k, v, grad, grad_lse = draw(layout, 64, torch.float16, batch=1)
    results = []
    for seed in range(3):
        with emulated(*MODULES, kernels=KERNELS, programs=1 + seed, seed=seed):
            out, lse = hopper.forward(q, k, v, layout, 0.1)
            results.append([out, lse, *hopper.backward(grad, grad_lse, q, k, v, out, lse, layout, 0.1)])
    assert tensors and all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


def test_the_emulator_finds_a_barrier_that_nobody_completes():
    scheduler = Scheduler(0)
    barrier = Barrier(scheduler, 2)
    with pytest.raises(Deadlock):
        scheduler.run([lambda: barrier.add(1, 0), lambda: barrier.wait(0)])

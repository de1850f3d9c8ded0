"""Summaries pooled, rotated and joined by one operator, against the dozen plain passes in float64.

On a CPU in Triton's interpreter; tests marked `gpu` want CUDA.
"""

import pytest
import torch

triton = pytest.importorskip("triton")

from kernels import Axis  # noqa: E402
from kernels.patterns import Hierarchical  # noqa: E402
from kernels.patterns.hierarchical import Summaries  # noqa: E402
from kernels.summaries.hierarchy import build_hierarchy  # noqa: E402
from kernels.summaries.join_summaries import can_join, join_summaries  # noqa: E402
from model.attention.hierarchical.pooling import SummaryPool  # noqa: E402
from model.rope import RotaryEmbedding  # noqa: E402
from tests.kernels.oracle import packing  # noqa: E402
from tests.model.small import config, positions_of  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
gpu = pytest.mark.gpu
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
THREE = Hierarchical(window=8, spans=(8, 24, 48), reaches=(24, 48), pooling="learned")
WIDE = Hierarchical(window=8, spans=(40,), reaches=(), pooling="learned")  # more pieces than one step looks at
DOCUMENTS = packing([20, 3, 57], [75, 5])


def problem(pattern, documents, dtype, head_dim, learned=True, tokens=True, length=80, batch=2):
    """(hierarchy, leaves, their twins in float64, rotation, pool in float64)."""
    torch.manual_seed(0)
    documents = None if documents is None else documents.to(DEVICE)
    axis = Axis.tokens(length, documents, device=DEVICE)
    hierarchy = build_hierarchy(pattern, axis, 16)
    levels = [level for level in hierarchy.levels if level.span > 1]
    sizes = config(kv_heads=2, head_dim=head_dim)
    pool = SummaryPool([level.span for level in levels], "learned" if learned else "mean", sizes).double().to(DEVICE)
    position = torch.arange(length)[None] if documents is None else positions_of(documents.cpu())
    rotation = RotaryEmbedding(sizes).to(DEVICE)(position.to(DEVICE))
    leaves = [torch.randn(batch, length, 2, head_dim, device=DEVICE).to(dtype).requires_grad_() for _ in range(3)]
    twins = [leaf.detach().double().requires_grad_() for leaf in leaves]
    if not tokens:
        leaves[0] = twins[0] = None
    if learned:
        torch.nn.init.normal_(pool.query)
        leaves.append(pool.query.detach().float().requires_grad_())
        pool.query.data.copy_(leaves[3])
        twins.append(pool.query)
    return hierarchy, leaves, twins, rotation, pool


def gradients(outputs, leaves, grads):
    used = [leaf for leaf in leaves if leaf is not None]
    return torch.autograd.grad(outputs, used, grads)


def check(pattern, documents, dtype, head_dim, learned=True, tokens=True, **sizes):
    hierarchy, leaves, twins, rotation, pool = problem(pattern, documents, dtype, head_dim, learned, tokens, **sizes)
    ours = join_summaries(hierarchy, *leaves[:3], leaves[3] if learned else None, rotation)
    truth = pool.join(hierarchy, *twins[:3], tuple(t.double() for t in rotation), "blocked")
    grads = [torch.randn_like(each) for each in ours]
    pairs = list(zip(ours, truth, strict=True))
    pairs += zip(
        gradients(ours, leaves, grads), gradients(truth, twins, [each.double() for each in grads]), strict=True
    )
    for got, want in pairs:
        assert got.shape == want.shape and got.dtype in (dtype, torch.float32)
        error = (got.double() - want).norm() / want.norm().clamp(min=1e-9)
        assert error < TOLERANCE[dtype], f"relative error {error:.1e}"
    return [each.detach() for each, _ in pairs]


@pytest.mark.parametrize("documents", [None, DOCUMENTS], ids=["one_document", "packed"])
@pytest.mark.parametrize("learned", [True, False], ids=["learned", "mean"])
@pytest.mark.parametrize(("pattern", "head_dim", "dtype"), [(THREE, 8, torch.float32), (WIDE, 24, torch.float16)])
def test_equals_the_plain_passes(pattern, head_dim, dtype, learned, documents):
    check(pattern, documents, dtype, head_dim, learned)


def test_summaries_alone_as_a_branch_of_their_own():
    check([Summaries(8)], DOCUMENTS, torch.float32, 8, tokens=False)


def test_spans_that_fit_no_document_get_zeros():
    hierarchy, leaves, *_, rotation, _ = problem(THREE, packing([40, 40]), torch.float32, 8, batch=1)
    keys, values = join_summaries(hierarchy, *leaves, rotation)
    coarse = hierarchy.levels[-1].axis.length
    assert coarse > 0 and not keys[:, :, -16:].any() and not values[:, :, -16:].any()
    grads = gradients((keys, values), leaves, [torch.ones_like(keys)] * 2)
    assert all(grad.isfinite().all() for grad in grads) and not grads[3][2].any() and grads[3][1].any()


def test_a_cpu_keeps_the_plain_passes():
    assert not can_join(torch.zeros(1), "auto")


@gpu
@needs_cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("head_dim", [32, 96, 128, 256])
@pytest.mark.parametrize("learned", [True, False], ids=["learned", "mean"])
def test_on_the_gpu(dtype, head_dim, learned):
    pattern = Hierarchical(window=64, spans=(16, 128, 1024), reaches=(256, 2048), pooling="learned")
    for documents in (None, packing([3000, 1096], [100, 3996])):
        check(pattern, documents, dtype, head_dim, learned, length=4096)


@gpu
@needs_cuda
def test_repeats_on_the_gpu_are_bitwise_equal():
    pattern = Hierarchical(window=1024, spans=(16, 128, 1024), reaches=(4096, 8192), pooling="learned")
    first = check(pattern, None, torch.bfloat16, 128, length=16384)
    for _ in range(5):
        again = check(pattern, None, torch.bfloat16, 128, length=16384)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))

"""The Triton top-k chooses, bit by bit, what the plain PyTorch one chooses."""

import pytest
import torch

triton = pytest.importorskip("triton")

from kernels import block_means, document_starts, select  # noqa: E402
from kernels.backends.triton.selection import top_k as triton_select  # noqa: E402
from tests.kernels.oracle import packing  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
gpu = pytest.mark.gpu
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")


def exact(shape, seed=0, most=2):
    """Small whole numbers: every product and sum is exact, and many scores are equal."""
    return torch.randint(-most, most + 1, shape, generator=torch.Generator().manual_seed(seed)).float().to(DEVICE)


def both(queries, summaries, first, **settings):
    ours = select(queries, summaries, first, backend="triton", **settings)
    truth = select(queries.double(), summaries.double(), first, backend="blocked", **settings)
    return ours, truth


@pytest.mark.parametrize(
    ("documents", "dim", "dtype", "settings"),
    [
        (packing([200]), 16, torch.float32, dict(top_k=3, window=20, block=16)),
        (packing([150]), 24, torch.float16, dict(top_k=4, window=1, block=16)),
        (packing([100, 3, 97], [16, 120, 64]), 32, torch.float32, dict(top_k=2, window=33, block=16)),
        (packing([100, 3, 97], [16, 120, 64]), 8, torch.float16, dict(top_k=5, window=9, block=16, first_block=True)),
        (packing([200]), 16, torch.float32, dict(top_k=1, window=64, block=32)),
        (packing([40]), 16, torch.float32, dict(top_k=8, window=100, block=16)),
        (packing([10]), 16, torch.float32, dict(top_k=2, window=4, block=16)),
    ],
)
def test_chooses_as_plain_pytorch_does(documents, dim, dtype, settings):
    batch, length = documents.shape
    queries = exact((batch, 2, length, dim)).to(dtype)
    summaries = exact((batch, 2, length // settings["block"], dim), seed=1).to(dtype)
    ours, truth = both(queries, summaries, document_starts(documents.to(DEVICE)), **settings)
    assert all(torch.equal(a, b) for a, b in zip(ours.tensors(), truth.tensors(), strict=True))


@pytest.mark.parametrize("kind", ["rising", "falling", "cycle", "equal"])
def test_more_blocks_than_one_step_looks_at(kind, monkeypatch):
    """Better blocks come late and in numbers, early, again and again, or never."""
    monkeypatch.setattr(triton_select, "BLOCKS", 16)
    monkeypatch.setattr(triton_select, "QUERIES", 128)
    line = {"rising": torch.arange(40), "falling": -torch.arange(40), "cycle": torch.arange(40) % 7}
    summaries = torch.zeros(1, 1, 40, 16)
    summaries[0, 0, :, 0] = line.get(kind, torch.zeros(40))
    first = torch.zeros(1, 640, dtype=torch.int32, device=DEVICE)
    queries = torch.ones(1, 1, 640, 16, device=DEVICE)
    ours, truth = both(queries, summaries.to(DEVICE), first, top_k=6, window=40, block=16)
    assert torch.equal(ours.chosen, truth.chosen)


@gpu
@needs_cuda
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("dim", [32, 64, 128])
@pytest.mark.parametrize("block", [32, 64, 128])
def test_on_the_gpu(dtype, dim, block):
    documents = packing([9000, 300, 7084], [16384, 0, 0]).cuda()
    queries = exact((2, 4, 16384, dim)).to(dtype)
    summaries = exact((2, 4, 16384 // block, dim), seed=1).to(dtype)
    first = document_starts(documents)
    settings = dict(top_k=15, window=512, block=block, first_block=True)
    ours, truth = both(queries, summaries, first, **settings)
    assert all(torch.equal(a, b) for a, b in zip(ours.tensors(), truth.tensors(), strict=True))


@gpu
@needs_cuda
def test_a_million_tokens_fit_and_repeat_bitwise():
    length, block = 1 << 20, 64
    generator = torch.Generator("cuda").manual_seed(0)
    draw = lambda: torch.randn(1, 2, length, 128, generator=generator, device="cuda", dtype=torch.bfloat16)  # noqa: E731
    queries, keys = draw(), draw()
    first = torch.zeros(1, length, dtype=torch.int32, device="cuda")
    summaries = block_means(keys, first, block)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    one = select(queries, summaries, first, top_k=16, window=1024, block=block)
    used = torch.cuda.max_memory_allocated() - before
    assert used < 8 << 30, "all scores would be 64 GB in float32 for each selector"
    two = select(queries, summaries, first, top_k=16, window=1024, block=block)
    assert all(torch.equal(a, b) for a, b in zip(one.tensors(), two.tensors(), strict=True))

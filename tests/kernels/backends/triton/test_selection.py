"""The Triton kernels on a Selection against a dense softmax in float64 whose mask is built pair by pair.

On a CPU in Triton's interpreter (float16 and float32: it multiplies bfloat16 wrongly); tests marked `gpu` want CUDA.
"""

import pytest
import torch

triton = pytest.importorskip("triton")

from kernels import Selection, attention, block_mass, document_starts, select  # noqa: E402
from kernels.backends import gathered  # noqa: E402
from kernels.backends.triton import selection as backend  # noqa: E402
from kernels.backends.triton.selection import gradients, launch_settings, work_items  # noqa: E402
from kernels.backends.triton.selection.launch_settings import SelectionConfig, choose  # noqa: E402
from tests.kernels.backends.triton.test_dense import TOLERANCE, oracle, tensors  # noqa: E402
from tests.kernels.oracle import packing  # noqa: E402
from tests.kernels.routing_oracle import naive_mask, random_choice  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
gpu = pytest.mark.gpu
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")


def selection_of(documents, selectors, slots, block, near=0.5, window=5):
    chosen = random_choice(documents, selectors, slots, window, block, near=near)
    first = document_starts(documents).to(DEVICE)
    return Selection.from_chosen(chosen.to(DEVICE), documents.shape[1], block, first)


def check(selection, documents, inputs, scale=None, with_lse=True):
    q, k, v, grad_out, grad_lse = inputs
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    repeat = selection.selectors // k.shape[1]
    mask = naive_mask(selection.chosen.cpu(), documents, selection.block)
    k_heads, v_heads = (t.repeat_interleave(repeat, 1) for t in (k, v))
    truth_lse = grad_lse if with_lse else torch.zeros_like(grad_lse)
    out, lse, dq, dk, dv = oracle(q, k_heads, v_heads, mask, scale, grad_out, truth_lse)
    dk, dv = (t.unflatten(1, (-1, repeat)).sum(2) for t in (dk, dv))

    ours, our_lse = backend.forward(q, k, v, selection, scale)
    grads = backend.backward(grad_out, grad_lse if with_lse else None, q, k, v, ours, our_lse, selection, scale)
    assert ours.dtype == q.dtype and our_lse.dtype == torch.float32
    empty = lse == -torch.inf
    assert torch.equal(our_lse == -torch.inf, empty)
    assert not ours[empty].any() and not grads[0][empty].any()
    precision = 1e-5 if q.dtype == torch.float32 else 1e-3
    torch.testing.assert_close(our_lse.double()[~empty], lse[~empty], atol=precision, rtol=1e-5)
    for name, got, want in zip(("out", "dq", "dk", "dv"), (ours, *grads), (out, dq, dk, dv), strict=True):
        error = (got.double() - want).norm() / want.norm().clamp(min=1e-6)
        assert error < TOLERANCE[q.dtype], f"{name}: relative error {error:.1e}"
    return ours, our_lse, grads


# documents, selectors a KV head, group, head_dim, block, slots, dtype; two KV heads.
CASES = [
    (packing([90]), 1, 1, 32, 16, 3, torch.float32),
    (packing([90]), 1, 2, 64, 16, 2, torch.float16),
    (packing([70]), 1, 16, 32, 16, 2, torch.float16),
    (packing([50, 3, 47], [16, 70, 14]), 1, 4, 32, 16, 3, torch.float32),
    (packing([50, 3, 47], [16, 70, 14]), 3, 3, 32, 16, 2, torch.float16),
    (packing([3, 4, 9, 2, 70, 12]), 1, 3, 96, 16, 3, torch.float32),
    (packing([100]), 1, 2, 128, 32, 2, torch.float16),
    (packing([200]), 1, 1, 32, 64, 2, torch.float16),
    (packing([12]), 1, 1, 32, 16, 2, torch.float32),
]


@pytest.mark.parametrize(("documents", "selectors", "group", "head_dim", "block", "slots", "dtype"), CASES)
def test_matches_the_oracle(documents, selectors, group, head_dim, block, slots, dtype):
    batch, length = documents.shape
    selection = selection_of(documents, 2 * selectors, slots, block)
    check(selection, documents, tensors(batch, 2 * group, 2, length, length, head_dim, dtype))


@pytest.mark.parametrize(
    ("documents", "group", "head_dim", "dtype"),
    [(packing([36, 3, 21]), 3, 96, torch.float32), (packing([40]), 16, 32, torch.float16)],
)
def test_every_way_to_write_partial_results(monkeypatch, documents, group, head_dim, dtype):
    """By the copy engine, which writes whole steps of rows; dQ computed transposed: the same results, to the bit."""
    batch, length = documents.shape
    inputs = tensors(batch, 2 * group, 2, length, length, head_dim, dtype)
    selection = selection_of(documents, 2, 2, 16)
    plain = check(selection, documents, inputs)
    for config in (
        SelectionConfig(32, 4, 1, tma_store=True),
        SelectionConfig(32, 4, 1, tma_store=True, transposed=True),
    ):
        for kernel in ("forward", "backward"):
            key = kernel, dtype.itemsize, 64 if head_dim <= 64 else 128
            monkeypatch.setitem(launch_settings._TABLE, key, config)
        ours = check(selection, documents, inputs)
        assert all(torch.equal(a, b) for a, b in zip(plain[:2], ours[:2], strict=True))


@pytest.mark.parametrize("scale", [-0.3, 0.0, 1.7])
def test_any_scale(scale):
    documents = packing([60])
    selection = selection_of(documents, 1, 2, 16)
    check(selection, documents, tensors(1, 2, 1, 60, 60, 32, torch.float32), scale, with_lse=bool(scale))


def test_one_row_of_document_starts_serves_a_batch():
    """Without documents a model has one row for all sequences, expanded: kernels address it by sequence."""
    documents = torch.zeros(2, 70, dtype=torch.int64)
    first = document_starts(documents[:1]).to(DEVICE).expand(2, -1)
    generator = torch.Generator().manual_seed(0)
    router = torch.randn(2, 2, 70, 8, generator=generator).to(DEVICE)
    summaries = torch.randn(2, 2, 4, 8, generator=generator).to(DEVICE)
    selection = select(router, summaries, first, top_k=2, window=5, block=16)
    assert selection.document_start.is_contiguous()
    check(selection, documents, tensors(2, 4, 2, 70, 70, 32, torch.float32))


def test_chunks_of_queries_and_long_lists_are_split(monkeypatch):
    """Every query chooses block 0, so its list is long; chunks of 25 queries, items of 4 entries."""
    documents = packing([50, 30], [80, 0])
    chosen = random_choice(documents, 2, 2, 5, 16)
    inputs = tensors(2, 4, 2, 80, 80, 32, torch.float32)
    selection = Selection.from_chosen(chosen.to(DEVICE), 80, 16, document_starts(documents).to(DEVICE))
    whole = check(selection, documents, inputs)
    monkeypatch.setattr(work_items, "ROWS_PER_ITEM", 8)
    monkeypatch.setattr(gradients, "ROWS_PER_ITEM", 8)
    monkeypatch.setattr(work_items, "MIN_PARTIAL_BYTES", 25 * 2 * 2 * 2 * (2 * 32 * 4))
    monkeypatch.setattr(work_items, "PARTIAL_OUTPUTS", 0)
    plan = work_items.make_plan(selection, 2, 2 * 32 * 4)
    assert (plan.queries_per_chunk, plan.chunks) == (25, 4) and (plan.split_lists[..., 1] > 1).sum() > 3
    assert int(plan.split_lists[..., 1].sum(1).max()) <= plan.buffers
    cut = check(selection, documents, inputs)
    assert all(torch.equal(a, b) for a, b in zip(whole[:2], cut[:2], strict=True)), "forward: the same sums"


@pytest.mark.parametrize(("piece", "rows"), [(1000, 6), (7, 6), (1, 2), (33, 100)])
def test_every_entry_is_worked_on_once(monkeypatch, piece, rows):
    documents = packing([90, 10], [33, 67])
    selection = selection_of(documents, 2, 3, 16)
    monkeypatch.setattr(work_items, "ROWS_PER_ITEM", rows)
    monkeypatch.setattr(work_items, "max_queries_per_chunk", lambda *_: min(piece, 100))
    plan = work_items.make_plan(selection, 2, 1, step=8)
    blocks = selection.offsets.shape[2] - 1
    entries = selection.entries.view(4, -1)
    done = []
    for index, items in enumerate(plan.items.tolist()):
        taken = {}
        begin = 0  # items have room for whole steps of rows, one behind the other: steps are written whole
        for list_of, first, count, slot, first_row in items:
            assert first_row == begin or not count
            begin += -(-2 * count // 8) * 8
            assert count <= max(1, rows // 2)
            line, block = divmod(list_of, blocks)
            for entry in entries[line, first : first + count].tolist():
                assert entry // 3 // min(piece, 100) == index
                done.append((line, block, entry))
            if count:
                taken.setdefault(list_of, []).append(slot)
        assert begin <= plan.rows
        for list_of, slots in taken.items():
            first_slot, cut = plan.split_lists[index, list_of].tolist()
            assert slots == (list(range(first_slot, first_slot + cut)) if len(slots) > 1 else [-1])
        used = [slot for slots in taken.values() for slot in slots if slot >= 0]
        assert sorted(used) == list(range(len(used))) and len(used) <= plan.buffers
    chosen = selection.chosen.view(4, -1)
    assert sorted(done) == sorted(
        (line, int(chosen[line, entry]), entry) for line, entry in (chosen >= 0).nonzero().tolist()
    )


@pytest.mark.parametrize(("group", "share"), [(1, "group"), (3, "group"), (2, "head"), (16, "group")])
def test_block_mass_equals_the_plain_one(group, share):
    documents = packing([50, 3, 47], [16, 70, 14])
    selection = selection_of(documents, 2 if share == "group" else 2 * group, 3, 16)
    q, k, _, _, lse = tensors(2, 2 * group, 2, 100, 100, 32, torch.float32)
    ours = block_mass(q, k, lse, selection, backend="triton")
    truth = gathered.block_mass(q.double(), k.double(), lse, selection, 32**-0.5)
    torch.testing.assert_close(ours.double(), truth, atol=1e-6, rtol=1e-5)


def test_strides_of_the_model_and_repeats_are_bitwise_equal():
    documents = packing([36, 24])
    q, k, v, grad_out, grad_lse = tensors(1, 4, 2, 60, 60, 32, torch.float16)
    selection = selection_of(documents, 2, 3, 16)
    plain = check(selection, documents, (q, k, v, grad_out, grad_lse))
    as_in_the_model = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v, grad_out)]
    for inputs in ((q, k, v, grad_out), as_in_the_model):
        again = check(selection, documents, (*inputs, grad_lse))
        pairs = zip((*plain[:2], *plain[2]), (*again[:2], *again[2]), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)


def test_attention_takes_it_and_unsupported_calls_are_named():
    documents = packing([60])
    selection = selection_of(documents, 1, 2, 16)
    q, k, v, *_ = tensors(1, 2, 1, 60, 60, 32, torch.float32)
    ours = attention(q, k, v, selection, backend="triton")
    torch.testing.assert_close(ours, attention(q, k, v, selection, backend="blocked"), atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="float64: must be one of"):
        attention(q.double(), k.double(), v.double(), selection, backend="triton")
    with pytest.raises(ValueError, match="head_dim 24: must be one of 32, 64"):
        attention(q[..., :24], k[..., :24], v[..., :24], selection, backend="triton")


def test_every_choice_exists():
    for kernel in ("forward", "backward", "mass"):
        for dtype in backend.common.DTYPES:
            for head_dim in backend.common.HEAD_DIMS:
                config = choose(kernel, dtype, head_dim)
                assert config.rows >= 16 and config.warps in (4, 8, 16)
                assert not (kernel == "backward" and config.tma_store and config.stages < 2)


def routed(length, batch, heads, kv_heads, head_dim, block, top_k, documents=None, seed=0):
    """bf16 inputs on the GPU, and a selection by random router queries and keys."""
    generator = torch.Generator("cuda").manual_seed(seed)
    draw = lambda h, d: torch.randn(batch, h, length, d, generator=generator, device="cuda", dtype=torch.bfloat16)  # noqa: E731
    q, k, v, grad = draw(heads, head_dim), draw(kv_heads, head_dim), draw(kv_heads, head_dim), draw(heads, head_dim)
    if documents is None:
        documents = torch.zeros(batch, length, dtype=torch.int64)
    first = document_starts(documents.cuda())
    summaries = torch.randn(batch, kv_heads, length // block, 32, generator=generator, device="cuda").bfloat16()
    selection = select(draw(kv_heads, 32), summaries, first, top_k=top_k, window=block, block=block)
    return q, k, v, grad, selection


@gpu
@needs_cuda
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("head_dim", [32, 64, 96, 128, 192, 256])
@pytest.mark.parametrize("block", [32, 64, 128])
def test_on_the_gpu(dtype, head_dim, block):
    documents = packing([500, 100, 552])
    if backend.unsupported("cuda", dtype, head_dim, 1, block):
        assert (dtype, block) == (torch.float32, 128) and head_dim > 128
        return
    for group in (1, 4, 16):
        q, k, v, grad, selection = routed(1152, 1, 2 * group, 2, head_dim, block, 4, documents)
        grad_lse = torch.randn(q.shape[:3], device="cuda")
        check(selection, documents, (*(t.to(dtype) for t in (q, k, v, grad)), grad_lse))


@gpu
@needs_cuda
@pytest.mark.parametrize("group", [1, 4, 16])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_sixteen_thousand_tokens_on_the_gpu(group, head_dim):
    """Against float64 gathers of the chosen blocks, which the CPU tests hold against the dense oracle."""
    q, k, v, grad, selection = routed(16384, 1, 2 * group, 2, head_dim, 64, 16)
    grad_lse = torch.randn(q.shape[:3], device="cuda")
    out, lse = backend.forward(q, k, v, selection, 0.1)
    grads = backend.backward(grad, grad_lse, q, k, v, out, lse, selection, 0.1)
    exact = [t.double() for t in (q, k, v)]
    truth = gathered.forward(*exact, selection, 0.1)
    truth_grads = gathered.backward(grad.double(), grad_lse.double(), *exact, *truth, selection, 0.1)
    for got, want in zip((out, *grads), (truth[0], *truth_grads), strict=True):
        assert (got.double() - want).norm() / want.norm() < TOLERANCE[torch.bfloat16]


@gpu
@needs_cuda
def test_twenty_repeats_are_bitwise_equal():
    q, k, v, grad, selection = routed(16384, 2, 16, 4, 128, 64, 16)
    results = []
    for _ in range(20):
        out, lse = backend.forward(q, k, v, selection, 0.1)
        results.append((out, lse, *backend.backward(grad, None, q, k, v, out, lse, selection, 0.1)))
        assert all(torch.equal(a, b) for a, b in zip(results[0], results[-1], strict=True))
        del results[1:]


@gpu
@needs_cuda
def test_pieces_of_queries_on_the_gpu(monkeypatch):
    q, k, v, grad, selection = routed(16384, 1, 16, 4, 128, 64, 16)
    whole, lse = backend.forward(q, k, v, selection, 0.1)
    grads = backend.backward(grad, None, q, k, v, whole, lse, selection, 0.1)
    monkeypatch.setattr(work_items, "MIN_PARTIAL_BYTES", 64 << 20)
    monkeypatch.setattr(work_items, "PARTIAL_OUTPUTS", 0)
    out, _ = backend.forward(q, k, v, selection, 0.1)
    assert torch.equal(out, whole)
    for got, want in zip(backend.backward(grad, None, q, k, v, out, lse, selection, 0.1), grads, strict=True):
        assert (got.double() - want.double()).norm() / want.double().norm() < 5e-3


@gpu
@needs_cuda
@pytest.mark.parametrize("graph", [False, True], ids=["eager", "cuda_graph"])
def test_many_pieces_give_the_same_bits_every_time(monkeypatch, graph):
    """Their partial results share one place, which is written and read again and again."""
    q, k, v, grad, selection = routed(16384, 1, 64, 4, 128, 64, 16)
    monkeypatch.setattr(work_items, "MIN_PARTIAL_BYTES", 64 << 20)
    monkeypatch.setattr(work_items, "PARTIAL_OUTPUTS", 0)

    def both():
        out, lse = backend.forward(q, k, v, selection, 0.1)
        return out, lse, *backend.backward(grad, None, q, k, v, out, lse, selection, 0.1)

    plain = both()
    run = both
    if graph:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            both()
        torch.cuda.current_stream().wait_stream(side)
        recorded = torch.cuda.CUDAGraph()
        with torch.cuda.graph(recorded):
            results = both()
        run = lambda: recorded.replay() or results  # noqa: E731
    for _ in range(10):
        torch.cuda.synchronize()
        held = torch.cuda.memory_allocated()
        found = run()
        assert all(torch.equal(a, b) for a, b in zip(plain, found, strict=True))
        del found
        assert torch.cuda.memory_allocated() == held


@gpu
@needs_cuda
@pytest.mark.alone
def test_a_million_tokens_on_the_gpu():
    """More than 2^31 elements in q; the last queries against float64 gathers of their blocks."""
    length = 1 << 20
    q, k, v, grad, selection = routed(length, 1, 20, 4, 128, 64, 8)
    assert q.numel() > 2**31
    out, lse = backend.forward(q, k, v, selection, 0.1)
    grads = backend.backward(grad, None, q, k, v, out, lse, selection, 0.1)
    assert all(bool(t.isfinite().all()) for t in (out, *grads))
    chosen = selection.chosen[0, -1, -64:].long()  # of the last KV head
    keys = (chosen[..., None] * 64 + torch.arange(64, device="cuda")).flatten(1)  # [64 queries, keys]
    k_rows, v_rows = k[0, -1].double()[keys], v[0, -1].double()[keys]
    scores = torch.einsum("hqd,qkd->hqk", q[0, -5:, -64:].double(), k_rows) * 0.1
    truth = torch.einsum("hqk,qkd->hqd", scores.softmax(-1), v_rows)
    assert (out[0, -5:, -64:].double() - truth).norm() / truth.norm() < 1e-2

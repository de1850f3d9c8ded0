"""What is prepared once per layout for the Triton kernels: the order of work, columns in chunks, transposed masks."""

import gc
import itertools

import pytest
import torch

triton = pytest.importorskip("triton")

from kernels import Axis, attention, build_layout  # noqa: E402
from kernels.backends.triton.dense import work as plan_module  # noqa: E402
from tests.kernels.backends.triton.test_dense import DEVICE, PATTERNS, check, tensors, visible_pairs  # noqa: E402


@pytest.fixture
def short_chunks(monkeypatch):
    monkeypatch.setattr(plan_module, "longest_chunk", lambda tiles, device: 2)
    plan_module._plans.clear()
    yield
    plan_module._plans.clear()


@pytest.mark.parametrize("name", ["dense", "window", "block_sparse"])
def test_long_columns_are_cut(name, short_chunks):
    layout = build_layout(PATTERNS[name], Axis.tokens(84, device=DEVICE), block=16)
    work = plan_module.plan_of(layout).columns(1, 1)
    assert (work.chunks[:, 1] > 1).any(), "nothing was cut: the test tests nothing"
    assert int(work.chunks[:, 1].where(work.chunks[:, 1] > 1, 0).sum()) <= work.buffers
    mask = visible_pairs(PATTERNS[name], 84, 84)[:, None]
    check(layout, mask, *tensors(1, 2, 1, 84, 84, 32, torch.float32))


def test_long_columns_of_several_layout_groups_are_cut(short_chunks):
    both = [PATTERNS["dense"], PATTERNS["window_sink"]]
    documents = torch.stack([torch.arange(100) // 70, torch.arange(100) // 100])
    layout = build_layout(both, Axis.tokens(100, documents.to(DEVICE)), block=16)
    mask = torch.stack([visible_pairs(p, 100, 100, documents) for p in both], 1)
    check(layout, mask, *tensors(2, 4, 2, 100, 100, 32, torch.float32))


def test_every_entry_is_worked_on_once():
    layout = build_layout([PATTERNS["block_sparse"], PATTERNS["dense"]], Axis.tokens(300, device=DEVICE), block=16)
    columns = layout.columns
    for chunk in (None, 1, 3, 7):
        work = plan_module._list_work(
            columns.start, columns.count, columns.partial, 3, 2, columns.blocks.numel() * layout.heads, chunk
        )
        done: dict[tuple, list] = {}
        for batch, head, column, first, count, partial, slot, _ in work.items.tolist():
            if slot != -2:
                done.setdefault((batch, head, column), []).append((first, count, partial, slot))
        assert len(done) == 3 * columns.start[0].numel()
        for (_, head, column), parts in done.items():
            first, count, partial = (int(t[0, head, column]) for t in (columns.start, columns.count, columns.partial))
            entries = sorted((f + i, i < p) for f, n, p, _ in parts for i in range(n))
            assert entries == [(first + i, i < partial) for i in range(count)]
            assert (len(parts) > 1) == all(slot >= 0 for *_, slot in parts)
        taken = [slot for parts in done.values() for *_, slot in parts if slot >= 0]
        assert sorted(taken) == list(range(len(taken))) and len(taken) <= work.buffers
        lengths = [n for *_, n, _, slot, _ in work.items.tolist() if slot != -2]
        assert all(2 * a >= b for a, b in itertools.pairwise(lengths) if b > 1), "longest first, by classes"


def test_transposed_masks():
    for block in (16, 32, 64, 128):
        layout = build_layout(PATTERNS["strided"], Axis.tokens(200, device=DEVICE), block=block)
        transposed = plan_module.plan_of(layout).transposed_masks
        as_bits = type(layout)(**{**vars(layout), "masks": transposed}).tile_masks()
        assert torch.equal(as_bits, layout.tile_masks().mT)


def test_a_plan_is_made_once_and_dies_with_its_layout():
    plan_module._plans.clear()
    documents = (torch.arange(40) // 25)[None].to(DEVICE)
    layout = build_layout(PATTERNS["window"], Axis.tokens(40, documents), block=16)
    q, k, v, *_ = tensors(1, 2, 1, 40, 40, 32, torch.float32)
    q.requires_grad_()
    for _ in range(2):
        attention(q, k, v, layout, backend="triton").sum().backward()
    assert len(plan_module._plans) == 1
    del layout
    gc.collect()
    assert len(plan_module._plans) == 0

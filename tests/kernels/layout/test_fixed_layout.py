"""Layouts of fixed sizes: the same tiles as exact ones, in tensors whose shapes no packing of documents changes."""

import dataclasses

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from kernels import Axis, BlockLayout, attention, build_layout
from kernels.layout import tiles
from kernels.layout.candidates import BlockedAxis, _candidate_runs, row_capacity
from kernels.layout.fuse import fuse
from kernels.patterns import BlockSparse, Dense, Hierarchical, Strided, Window
from kernels.summaries.hierarchy import build_hierarchy
from tests.kernels.layout.test_layout import assert_exact, packings, patterns
from tests.kernels.oracle import PATTERNS, brute_force_mask, packing


def trimmed(layout: BlockLayout) -> BlockLayout:
    """The layout with the masks that are in use, as an exact one holds them."""
    assert not layout.overflow
    used = max([0, *layout.rows.tiles.tolist()]) + 1
    assert not layout.masks[used:].any(), "room that is not used holds nothing"
    return dataclasses.replace(layout, masks=layout.masks[:used])


def of(packed: torch.Tensor | int) -> Axis:
    packed = torch.zeros(1, packed) if isinstance(packed, int) else packed
    return Axis.tokens(packed.shape[1], packed)


@settings(max_examples=200)
@given(pattern=patterns, packed=packings(), block=st.sampled_from([16, 32, 128]))
@example(pattern=Strided(1, 10, 1), packed=packing([100, 3, 57, 40]), block=16)
@example(pattern=BlockSparse(7, 1, 1, 3), packed=packing([1, 150, 49]), block=16)
@example(pattern=Dense(), packed=packing([70, 2, 2, 2, 84]), block=16)
def test_it_holds_exactly_the_visible_pairs(pattern, packed, block):
    axis = of(packed)
    layout = trimmed(build_layout(pattern, axis, block=block, fixed=True))
    assert_exact(layout, brute_force_mask(pattern, axis))


def test_one_pattern_a_kv_head():
    per_head, axis = [Window(5), Strided(3, 20, 2), Window(5)], of(packing([20, 30], [7, 43]))
    layout = build_layout(per_head, axis, block=16, fixed=True)
    assert torch.equal(layout.dense_mask(), brute_force_mask(per_head, axis)) and not layout.overflow
    assert torch.equal(layout.pairs, brute_force_mask(per_head, axis).sum((2, 3)))


@pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS)
def test_shapes_do_not_depend_on_the_documents(pattern):
    packs = packing([200], [1] * 200), packing([150, 50], [99, 101]), packing([3, 197], [100, 100])
    shapes = [[t.shape for t in build_layout(pattern, of(packed), block=16, fixed=True).tensors()] for packed in packs]
    assert shapes[0] == shapes[1] == shapes[2]


@settings(max_examples=150)
@given(pattern=patterns, packed=packings(), block=st.sampled_from([16, 32]))
def test_no_row_needs_more_than_its_capacity(pattern, packed, block):
    blocks = BlockedAxis(of(packed), block)
    assert (_candidate_runs(pattern, blocks, blocks)[1].sum(-1) <= row_capacity(pattern, blocks, blocks)).all()


def test_columns_that_are_still_ahead_take_no_places():
    blocks = BlockedAxis(of(packing([4096])), 16)
    places = row_capacity(Strided(32, 256, 16), blocks, blocks)
    rows = torch.arange(len(places))
    # The window's 5 blocks, a column's 2 for every stride that has begun, 1 for documents that begin inside.
    assert (places <= 5 + 2 * (rows * 16 // 256 + 1) + 1).all()


def test_a_windows_places_are_few():
    """What a fixed size costs: two or three tiles a row more than a packing needs, not a share of the square."""
    layout = build_layout(Window(1024), of(packing([5000, 3192])), fixed=True)
    exact = build_layout(Window(1024), of(packing([5000, 3192])))
    assert exact.rows.blocks.numel() <= layout.rows.blocks.numel() <= exact.rows.blocks.numel() + 4 * 64


@pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS)
def test_the_device_is_asked_for_nothing(pattern):
    """Fake tensors have no values: whoever asks for one fails. An exact layout asks."""
    documents = packing([40, 60])
    build_layout(pattern, of(documents), block=16, fixed=True)  # what depends on shapes alone is made, and kept
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        axis = of(mode.from_tensor(documents))
        build_layout(pattern, axis, block=16, fixed=True)
        with pytest.raises(DataDependentOutputException):
            build_layout(pattern, axis, block=16)


def test_too_little_room_is_reported(monkeypatch):
    axis = of(packing([33, 45, 22]))
    pattern = BlockSparse(7, 1, 1, 2)
    assert not build_layout(pattern, axis, block=16, fixed=True).overflow
    monkeypatch.setattr(tiles, "MASKS", 2)
    monkeypatch.setattr(tiles, "MASKS_PER_ROW", 0)
    layout = build_layout(pattern, axis, block=16, fixed=True)
    assert layout.overflow
    assert int(layout.rows.tiles.max()) < len(layout.masks) == 2, "wrong, but within its tensors"
    monkeypatch.setattr("kernels.layout.candidates._fixed_entries", lambda *_: _few_places())
    assert build_layout(Dense(), axis, block=16, fixed=True).overflow


def _few_places():
    rows = torch.arange(7)
    return torch.ones(7, dtype=torch.int64), rows, torch.zeros_like(rows)


def test_attention_on_it_is_the_same():
    axis = of(packing([40, 60], [90, 10]))
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, heads, 100, 16, generator=generator, dtype=torch.float64) for heads in (4, 2, 2))
    exact, fixed = (build_layout(Window(30, 2), axis, block=16, fixed=f) for f in (False, True))
    torch.testing.assert_close(attention(q, k, v, fixed), attention(q, k, v, exact), rtol=0, atol=1e-14)


def test_fixed_sizes_need_a_limit():
    axis = dataclasses.replace(of(packing([40])), limit=None)
    with pytest.raises(ValueError, match="fixed=True: must have axes with a limit"):
        build_layout(Window(3), axis, block=16, fixed=True)


def test_what_is_small_is_computed_before(monkeypatch):
    """`fuse` on the CPU, uncompiled: the random blocks' hashes in the first part, pairs alone in the second."""
    monkeypatch.setattr(torch, "compile", lambda module, **_: module)
    pattern = BlockSparse(8, 1, 1, 2)
    query, key = torch.arange(48).view(3, 16, 1), torch.arange(48).view(3, 1, 16) // 2

    def pairs(query, key):
        return pattern.visible(query, key, key + 1).sum((1, 2))

    fused = fuse(pairs, (query, key), 3 * 16 * 16)
    assert torch.equal(fused(query, key), pairs(query, key)) and fused(query, key).any()
    before, after = (
        [str(node.target) for node in part.graph.nodes if node.op == "call_function"]
        for part in (fused.submod_0, fused.submod_1)
    )
    assert any("remainder" in name for name in before) and not any("remainder" in name for name in after)
    assert any("sum" in name for name in after) and not any("sum" in name for name in before)


@settings(max_examples=100)
@given(
    packed=packings(),
    hierarchy=st.sampled_from([(20, (4, 16), (50,)), (3, (2,), ()), (40, (8, 32, 64), (70, 150)), (1, (5,), ())]),
    block=st.sampled_from([16, 32]),
)
@example(packed=packing([1] * 60 + [100]), hierarchy=(20, (4, 16), (50,)), block=16)
def test_summaries_fit_their_places(packed, hierarchy, block):
    tokens = of(packed)
    pattern = Hierarchical(*hierarchy, pooling="mean")
    exact, fixed = (build_hierarchy(pattern, tokens, block, fixed=fixed) for fixed in (False, True))
    assert not fixed.overflow
    assert torch.equal(fixed.layout.dense_mask(), exact.layout.dense_mask())
    assert torch.equal(fixed.layout.pairs, exact.layout.pairs)


def test_summaries_ask_the_device_for_nothing():
    pattern, documents = Hierarchical(20, (4, 16), (50,), pooling="mean"), packing([40, 160])
    build_hierarchy(pattern, of(documents), 16, fixed=True)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        tokens = of(mode.from_tensor(documents))
        assert build_hierarchy(pattern, tokens, 16, fixed=True).layout.queries == 200
        with pytest.raises(DataDependentOutputException):
            build_hierarchy(pattern, tokens, 16)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS)
def test_on_the_gpu_it_is_exact_and_waits_for_nothing(pattern):
    """Fused kernels; the second build, and attention on it, in a mode in which waiting for the device is an error."""
    packs = [packing([200, 300, 1, 11], [512] + [0] * 3), packing([100] * 5 + [12], [77, 435] + [0] * 4)]
    q, k, v = (torch.randn(2, h, 512, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True) for h in (4, 2, 2))
    attention(q, k, v, build_layout(pattern, of(packs[0].cuda()), block=64, fixed=True)).sum().backward()
    documents = packs[1].cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        layout = build_layout(pattern, of(documents), block=64, fixed=True)
        attention(q, k, v, layout).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert not layout.overflow
    assert torch.equal(layout.dense_mask().cpu(), brute_force_mask(pattern, of(packs[1])))
    assert torch.equal(layout.pairs, build_layout(pattern, of(documents), block=64).pairs)

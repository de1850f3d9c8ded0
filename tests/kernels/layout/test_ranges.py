"""Layouts of some ranges of an axis: the rows of the whole sequence's layout, over all keys or those in reach."""

import pytest
import torch

from kernels import Axis, build_layout
from kernels.patterns import Window
from tests.kernels.layout.test_layout import assert_exact
from tests.kernels.oracle import PATTERNS, brute_force_mask, packing

LENGTH, BLOCK = 160, 16
PACKED = packing([3, 70, 50, 37], [100, 1, 1, 58])
QUERIES = {
    "first": [range(0, 80)],
    "last": [range(80, 160)],
    "two_chunks": [range(32, 64), range(112, 144)],
    "ragged_end": [range(48, 64), range(96, 157)],
}


def axis(documents: bool) -> Axis:
    return Axis.tokens(LENGTH, PACKED if documents else None)


@pytest.mark.parametrize("documents", [True, False], ids=["packed", "one_document"])
@pytest.mark.parametrize("ranges", QUERIES.values(), ids=QUERIES)
@pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS)
def test_queries_of_some_ranges_see_what_they_see_in_the_whole_sequence(pattern, ranges, documents):
    whole = axis(documents)
    mask = brute_force_mask(pattern, whole)[:, :, [i for r in ranges for i in r]]
    for fixed in {False, documents}:
        layout = build_layout(pattern, whole.take(ranges), whole, BLOCK, fixed=fixed)
        assert not layout.overflow
        assert torch.equal(layout.dense_mask(), mask)
        assert torch.equal(layout.pairs, mask.sum((2, 3)))
        if not fixed:
            assert_exact(layout, mask)


@pytest.mark.parametrize("fixed", [True, False], ids=["fixed", "exact"])
def test_keys_of_some_ranges(fixed):
    """A window's queries over the keys in its reach alone, a gap between two chunks included."""
    whole, width = axis(True), 20
    queries, keys = [range(32, 64), range(112, 144)], [range(0, 64), range(80, 144)]
    mask = brute_force_mask(Window(width), whole)
    of_queries = mask[:, :, [i for r in queries for i in r]]
    in_reach = of_queries[..., [i for r in keys for i in r]]
    assert in_reach.sum() == of_queries.sum()
    layout = build_layout(Window(width), whole.take(queries), whole.take(keys), BLOCK, fixed=fixed)
    assert torch.equal(layout.dense_mask(), in_reach) and not layout.overflow


def test_a_slice_takes_no_more_room_than_its_rows():
    """Fixed sizes of a half are about half of the whole's."""
    whole = Axis.tokens(4096, torch.zeros(1, 4096, dtype=torch.int32))
    entries = lambda queries, keys: len(build_layout(Window(256), queries, keys, fixed=True).rows.blocks)  # noqa: E731
    half = entries(whole.take([range(2048, 4096)]), whole.take([range(1792, 4096)]))
    assert half < 0.75 * entries(whole, whole)


def test_summaries_of_some_slots():
    """Slots of the whole axis keep their positions and documents."""
    summaries = Axis.summaries(axis(True), 8)
    part = summaries.take([range(3, 11)])
    for name in ("start", "end", "document", "origin"):
        assert torch.equal(getattr(part, name), getattr(summaries, name)[:, 3:11])
    assert (part.span, part.limit) == (8, LENGTH)


def test_the_whole_range_is_the_axis_itself():
    whole = axis(False)
    assert whole.take([range(LENGTH)]) is whole


def test_a_block_of_queries_must_lie_in_one_range():
    whole = axis(True)
    with pytest.raises(ValueError, match=r"queries of ranges .*range\(8, 24\).*: must be whole blocks of 16"):
        build_layout(Window(4), whole.take([range(8, 24), range(32, 48)]), whole, BLOCK)

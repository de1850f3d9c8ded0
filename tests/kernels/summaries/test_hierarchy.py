"""Levels of summaries as layouts: coverage is a partition, slots and sizes, joined layouts and keys, and their cost."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import Axis, build_layout
from kernels.layout.concatenate import concatenate, concatenate_keys
from kernels.patterns import Dense, Hierarchical, Window
from kernels.patterns.hierarchical import Summaries
from kernels.summaries.hierarchy import build_hierarchy
from tests.kernels.oracle import brute_force_mask, packing

TWO = Hierarchical(window=10, spans=(4, 16), reaches=(24,), pooling="mean")
THREE = Hierarchical(window=5, spans=(2, 6, 18), reaches=(11, 30), pooling="mean")
PATTERNS = {
    "one_level": Hierarchical(window=7, spans=(8,), reaches=(), pooling="mean"),
    "two_levels": TWO,
    "three_levels": THREE,
    "window_of_itself": Hierarchical(window=1, spans=(3, 6), reaches=(2,), pooling="mean"),
    "reaches_within_a_span": Hierarchical(window=3, spans=(2, 32), reaches=(4,), pooling="mean"),
}
DOCUMENTS = {
    "none": None,
    "packed": packing([37, 46, 12], [95, 0, 0]),
    "short": packing([5, 3, 1, 1, 20, 65], [16, 16, 16, 16, 16, 15]),
    "single_tokens": packing([1] * 95),
}
LENGTH, BLOCK = 95, 16


def summarized_tokens(axis: Axis, length: int) -> torch.Tensor:
    """Booleans `[batch, keys, length]`: for which tokens each key stands, from the intervals alone."""
    token = torch.arange(length)
    first, stop = (axis.origin + axis.start)[..., None], (axis.origin + axis.end)[..., None]
    return (token >= first) & (token < stop)


def masks_by_level(hierarchy) -> list[torch.Tensor]:
    """The layout's mask, `[batch, queries, keys]`, cut into the levels' keys; what lies between them is hidden."""
    mask, cut, begin = hierarchy.layout.dense_mask()[:, 0], [], 0
    for level in hierarchy.levels:
        padded = -(-level.axis.length // hierarchy.layout.block) * hierarchy.layout.block
        cut.append(mask[..., begin : begin + level.axis.length])
        assert not mask[..., begin + level.axis.length : begin + padded].any()
        begin += padded
    assert begin == hierarchy.layout.keys
    return cut


def coverage(hierarchy, length: int) -> torch.Tensor:
    """How often each query covers each token, by itself or by a summary: `[batch, queries, tokens]`."""
    total = torch.zeros(1, length, length, dtype=torch.long)
    for level, mask in zip(hierarchy.levels, masks_by_level(hierarchy), strict=True):
        total = total + mask.long() @ summarized_tokens(level.axis, length).long()
    return total


@pytest.mark.parametrize("documents", DOCUMENTS.values(), ids=DOCUMENTS)
@pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS)
def test_every_past_token_is_covered_exactly_once(pattern, documents):
    tokens = Axis.tokens(LENGTH, documents)
    hierarchy = build_hierarchy(pattern, tokens, BLOCK)
    past = brute_force_mask(Dense(), tokens)[:, 0]
    assert torch.equal(coverage(hierarchy, LENGTH), past.long())


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_coverage_is_a_partition_for_any_settings(data):
    spans = list(
        itertools.accumulate(data.draw(st.lists(st.integers(2, 4), min_size=1, max_size=3)), lambda a, b: a * b)
    )
    window = data.draw(st.integers(1, 12))
    steps = data.draw(st.lists(st.integers(1, 20), min_size=len(spans) - 1, max_size=len(spans) - 1))
    pattern = Hierarchical(window, spans, list(itertools.accumulate([window, *steps]))[1:], "mean")
    lengths = data.draw(st.lists(st.integers(1, 50), min_size=1, max_size=4))
    tokens = Axis.tokens(sum(lengths), packing(lengths))
    hierarchy = build_hierarchy(pattern, tokens, BLOCK)
    assert torch.equal(coverage(hierarchy, tokens.length), brute_force_mask(Dense(), tokens)[:, 0].long())


@pytest.mark.parametrize("documents", ["packed", "short", "single_tokens"])
@pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS)
def test_in_fixed_sizes_it_is_the_same(pattern, documents):
    tokens = Axis.tokens(LENGTH, DOCUMENTS[documents])
    exact, fixed = (build_hierarchy(pattern, tokens, BLOCK, fixed=f) for f in (False, True))
    assert exact.overflow is None and not fixed.overflow
    assert torch.equal(fixed.layout.dense_mask(), exact.layout.dense_mask())
    assert fixed.parts() == exact.parts()


def test_fixed_sizes_follow_from_the_length_alone():
    shapes = [
        [
            tensor.shape
            for tensor in build_hierarchy(TWO, Axis.tokens(LENGTH, documents), BLOCK, fixed=True).layout.tensors()
        ]
        for documents in (packing([95]), packing([37, 46, 12]), packing([1] * 20 + [75]))
    ]
    assert shapes[0] == shapes[1] == shapes[2]


@pytest.mark.parametrize("documents", DOCUMENTS.values(), ids=DOCUMENTS)
def test_levels_are_what_the_pattern_says_pair_by_pair(documents):
    tokens = Axis.tokens(LENGTH, documents)
    hierarchy = build_hierarchy(TWO, tokens, BLOCK)
    for level, mask in zip(hierarchy.levels, masks_by_level(hierarchy), strict=True):
        expected = brute_force_mask(TWO, tokens, level.axis)[:, 0]
        assert torch.equal(mask, expected)
        assert torch.equal(level.pairs[:, 0], expected.sum((1, 2)))
        if level.span > 1:  # the whole pattern on these keys alone: its candidates miss nothing either
            assert torch.equal(build_layout(TWO, tokens, level.axis, BLOCK).dense_mask()[:, 0], expected)
    assert list(hierarchy.parts()) == ["tokens", "summaries of 4", "summaries of 16"]
    assert sum(hierarchy.parts().values()) == int(hierarchy.layout.pairs.sum())


def test_a_querys_levels_by_hand():
    """Query 60 of one document: window 10 -> from 51, rounded to 48; reach 24 -> from 37, rounded to 32."""
    hierarchy = build_hierarchy(TWO, Axis.tokens(LENGTH), BLOCK)
    seen = [mask[0, 60].nonzero().flatten().tolist() for mask in masks_by_level(hierarchy)]
    assert seen == [list(range(48, 61)), [8, 9, 10, 11], [0, 1]]


# The slots of spans


@pytest.mark.parametrize("span", [2, 3, 7, 16, 95])
@pytest.mark.parametrize("documents", DOCUMENTS.values(), ids=DOCUMENTS)
def test_every_whole_span_has_a_slot_and_no_other(documents, span):
    tokens = Axis.tokens(LENGTH, documents)
    axis = Axis.summaries(tokens, span)
    assert axis.length == LENGTH // span  # whatever the documents
    for b in range(tokens.batch):
        intervals = zip(*(t[b].tolist() for t in (axis.document, axis.start, axis.end, axis.origin)), strict=True)
        whole = [each for each in intervals if each[1] < each[2]]
        expected = []
        for document in tokens.document[b].unique().tolist():
            where = (tokens.document[b] == document).nonzero().flatten()
            expected += [(document, s, s + span, int(where[0])) for s in range(0, len(where) - span + 1, span)]
        assert whole == expected
    # What layouts are built on: documents, and within them beginnings and ends, never fall.
    for edge in (axis.start, axis.end):
        assert ((axis.document.long() * 1000 + edge).diff() >= 0).all()


def test_a_span_longer_than_the_sequence_is_refused_and_a_level_of_it_left_out():
    with pytest.raises(ValueError, match="span=96: must be at most the length of the axis, 95"):
        Axis.summaries(Axis.tokens(LENGTH), 96)
    levels = build_hierarchy(Hierarchical(4, (2, 96), (8,), "mean"), Axis.tokens(LENGTH), BLOCK).levels
    assert [level.span for level in levels] == [1, 2]
    with pytest.raises(ValueError, match="span=96: must be at most the sequence's length, 95"):
        build_hierarchy([Summaries(96)], Axis.tokens(LENGTH), BLOCK)
    with pytest.raises(ValueError, match="must start at position 0"):
        build_hierarchy(TWO, Axis.tokens(LENGTH, offset=3), BLOCK)


def test_a_level_alone_sees_all_whole_spans_of_the_past():
    """The compressed branch of NSA."""
    tokens = Axis.tokens(LENGTH, DOCUMENTS["packed"])
    hierarchy = build_hierarchy([Summaries(8)], tokens, BLOCK)
    axis = hierarchy.levels[0].axis
    seen = (axis.end[:, None] <= tokens.end[..., None]) & (axis.start < axis.end)[:, None]
    seen &= axis.document[:, None] == tokens.document[..., None]
    assert torch.equal(masks_by_level(hierarchy)[0], seen)


def test_hierarchies_without_documents_are_built_once_and_serve_training_after_validation():
    build = lambda length: build_hierarchy(TWO, Axis.tokens(length), BLOCK)  # noqa: E731
    with torch.inference_mode():
        first = build(71)
    assert build(71) is first and build(72) is not first
    assert not any(tensor.is_inference() for tensor in first.layout.tensors())
    assert build_hierarchy(TWO, Axis.tokens(LENGTH, DOCUMENTS["packed"]), BLOCK).layout.batch == 2


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"window": 0}, "window=0: must be an integer >= 1"),
        ({"spans": ()}, r"spans=\[\]: must be integers >= 2, each a multiple of the one before"),
        ({"spans": (1, 4)}, r"spans=\[1, 4\]: must be integers >= 2"),
        ({"spans": (4, 6)}, r"spans=\[4, 6\]: must be integers >= 2, each a multiple"),
        ({"spans": 4}, "spans=4: must be a list of integers"),
        ({"spans": (4, 8.0)}, "must be a list of integers"),
        ({"reaches": ()}, r"reaches=\[\]: must be one fewer than spans \(1\)"),
        ({"reaches": (10,)}, r"reaches=\[10\]: must be rising and greater than the window \(10\)"),
        ({"pooling": "max"}, "pooling='max': must be one of mean, learned"),
    ],
)
def test_impossible_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        Hierarchical(**(vars(TWO) | settings))


# Concatenated layouts and keys


def test_concatenated_layouts_are_one_mask_beside_the_other():
    tokens = Axis.tokens(70, packing([30, 40], [70, 0]))
    parts = [
        (Window(9), tokens),
        ([Dense(), Window(30)], tokens),
        (Summaries(4), Axis.summaries(tokens, 4)),
        (Window(70), Axis.tokens(20)),  # shared by the sequences
    ]
    queries = [tokens, tokens, tokens, Axis.tokens(70)]
    layouts = [build_layout(p, q, keys, BLOCK) for q, (p, keys) in zip(queries, parts, strict=True)]
    whole = concatenate(layouts)
    assert (whole.batch, whole.heads, whole.keys) == (2, 2, 80 + 80 + 32 + 32)
    expected = [
        torch.nn.functional.pad(each.dense_mask().expand(2, 2, -1, -1), (0, -each.keys % BLOCK)) for each in layouts
    ]
    assert torch.equal(whole.dense_mask(), torch.cat(expected, -1))
    assert torch.equal(whole.pairs, whole.dense_mask().sum((2, 3)))
    for side in (whole.rows, whole.columns):
        for b, h, line in itertools.product(range(2), range(2), range(side.count.shape[2])):
            begin, count, partial = (int(t[b, h, line]) for t in (side.start, side.count, side.partial))
            kinds = (side.tiles[begin : begin + count] != -1).tolist()
            assert kinds == [True] * partial + [False] * (count - partial)
    # The columns tell of the same tiles as the rows.
    assert torch.equal(whole.columns.count.sum(-1), whole.rows.count.sum(-1))


@pytest.mark.parametrize(
    "other, message",
    [
        (build_layout(Dense(), Axis.tokens(20), block=32), "block 32"),
        (build_layout(Dense(), Axis.tokens(21), block=16), "21 queries"),
        (build_layout([Dense(), Window(3), Dense()], Axis.tokens(20), block=16), "2 heads: must be 1 or 1, 3"),
    ],
)
def test_layouts_that_do_not_fit_are_refused(other, message):
    first = build_layout([Dense(), Window(3)], Axis.tokens(20), block=16)
    with pytest.raises(ValueError, match=message):
        concatenate([first, other])
    with pytest.raises(ValueError, match="at least one"):
        concatenate([])


def test_keys_are_joined_as_the_layout_has_them():
    parts = [torch.randn(1, 2, n, 4) for n in (20, 16, 3)]
    joined = concatenate_keys(parts, 16)
    assert joined.shape == (1, 2, 32 + 16 + 16, 4)
    for part, begin in zip(parts, (0, 32, 48), strict=True):
        assert torch.equal(joined[:, :, begin : begin + part.shape[2]], part)
    assert not joined[:, :, 20:32].any() and not joined[:, :, 51:].any()


# Cost and pictures


@pytest.mark.parametrize("documents", DOCUMENTS.values(), ids=DOCUMENTS)
def test_levels_painted_over_the_tokens_that_they_stand_for_fill_the_past(documents):
    tokens = Axis.tokens(LENGTH, documents)
    hierarchy = build_hierarchy(TWO, tokens, BLOCK)
    painted = hierarchy.token_masks()
    assert [shade for _, shade in painted] == [1, 0.5, 0.25]
    assert torch.equal(sum(mask.long() for mask, _ in painted), brute_force_mask(Dense(), tokens)[0, 0].long())


def test_cost_is_relative_to_causal_attention_over_the_tokens():
    hierarchy = build_hierarchy(TWO, Axis.tokens(LENGTH), BLOCK)
    cost = hierarchy.cost(batch=3, heads=4, head_dim=8)
    assert cost.causal_pairs == 3 * 4 * LENGTH * (LENGTH + 1) // 2
    assert cost.visible_pairs == 3 * 4 * sum(hierarchy.parts().values())
    assert cost.flops == 12 * 8 * cost.visible_pairs


def test_coarse_levels_are_cheap():
    """Pairs grow with T * (window + a few spans), and only the coarsest level with T * T / span."""
    pattern = Hierarchical(window=64, spans=(8, 64), reaches=(512,), pooling="mean")
    short, long = (build_hierarchy(pattern, Axis.tokens(n), 64).parts() for n in (1024, 4096))
    assert long["tokens"] < 4.2 * short["tokens"] and long["summaries of 8"] < 7 * short["summaries of 8"]
    assert long["summaries of 64"] < 4096**2 / 2 / 64
    assert sum(long.values()) < 0.08 * 4096**2 / 2

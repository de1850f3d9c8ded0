"""Hierarchical attention in the kernels: coverage is a partition, pooling and attention equal a float64 oracle."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import Axis, attention, build_layout
from kernels.concatenate import concatenate, concatenate_keys
from kernels.hierarchy import build_hierarchy
from kernels.patterns import Dense, Hierarchical, Window
from kernels.patterns.hierarchical import Summaries
from kernels.pooling import middles, pool
from tests.kernels.oracle import Case, assert_same, brute_force_mask, dense_attention, packing

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
    with pytest.raises(ValueError, match="from position 0 on"):
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
        ({"spans": ()}, r"spans=\[\]: must be from 2, each a multiple of the one before"),
        ({"spans": (1, 4)}, r"spans=\[1, 4\]: must be from 2"),
        ({"spans": (4, 6)}, r"spans=\[4, 6\]: must be from 2, each a multiple"),
        ({"spans": 4}, "spans=4: must be a list of whole numbers"),
        ({"spans": (4, 8.0)}, "must be a list of whole numbers"),
        ({"reaches": ()}, r"reaches=\[\]: must be one fewer than spans \(1\)"),
        ({"reaches": (10,)}, r"reaches=\[10\]: must be rising, and beyond the window \(10\)"),
        ({"pooling": "max"}, "pooling='max': must be one of mean, learned"),
    ],
)
def test_impossible_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        Hierarchical(**(vars(TWO) | settings))


# Concatenated layouts


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


# Pooling and attention, against an oracle that knows neither slots nor tiles


def oracle(pattern, tokens: Axis, q, k, v, queries_by_level, sink_logits=None):
    """Sequence by sequence and document by document: spans are slices, softmax is over a list of keys.

    `queries_by_level` float64 `[levels, kv_heads, head_dim]`, or None for the mean. Returns (out, lse)."""
    out, lse = [], []
    for b in range(q.shape[0]):
        document = tokens.document[min(b, tokens.batch - 1)]
        keys, values, covers = [k[b]], [v[b]], [torch.eye(tokens.length, dtype=torch.bool)]
        finer = {(int(i), 1): (k[b, :, i], v[b, :, i]) for i in range(tokens.length)}
        unit = 1
        for level, span in enumerate(pattern.spans):
            for each in document.unique().tolist():
                where = (document == each).nonzero().flatten().tolist()
                for begin in range(where[0], where[-1] + 2 - span, span):
                    pieces = [finer[(i, unit)] for i in range(begin, begin + span, unit)]
                    piece_keys, piece_values = (torch.stack(part, 1) for part in zip(*pieces, strict=True))
                    if queries_by_level is None:
                        weights = torch.full(piece_keys.shape[:2], unit / span, dtype=q.dtype)
                    else:
                        weights = torch.einsum("hnd,hd->hn", piece_keys, queries_by_level[level]).softmax(-1)
                    summary = [torch.einsum("hn,hnd->hd", weights, part) for part in (piece_keys, piece_values)]
                    finer[(begin, span)] = tuple(summary)
                    keys.append(summary[0][:, None]), values.append(summary[1][:, None])
                    stands_for = torch.arange(tokens.length)
                    covers.append(((stands_for >= begin) & (stands_for < begin + span))[None])
            unit = span
        covers = torch.cat(covers)
        # A query sees the coarsest keys that its pattern lets it see; positions count within the document.
        start = torch.tensor([int((document == d).nonzero()[0]) for d in document.tolist()])
        first = covers.int().argmax(-1)
        size = covers.sum(-1)
        position = torch.arange(tokens.length) - start
        key_start = first - start[first]
        mask = pattern.visible(position[:, None], key_start, key_start + size)
        mask &= (document[:, None] == document[first]) & (key_start + size <= position[:, None] + 1)
        one = dense_attention(
            q[b : b + 1],
            torch.cat(keys, 1)[None],
            torch.cat(values, 1)[None],
            mask[None, None],
            q.shape[-1] ** -0.5,
            sink_logits,
        )
        out.append(one[0]), lse.append(one[1])
    return torch.cat(out), torch.cat(lse)


def hierarchical_attention(pattern, hierarchy, q, k, v, queries_by_level, sink_logits=None, backend="blocked"):
    """Pooling and attention from kernels' pieces (without a rotation, which the kernels know nothing of)."""
    keys, values, unit = k.transpose(1, 2), v.transpose(1, 2), 1
    parts = [(k, v)]
    for i, level in enumerate(hierarchy.levels[1:]):
        scores = None if queries_by_level is None else (keys * queries_by_level[i].to(keys.dtype)).sum(-1)
        keys, values = pool(keys, values, scores, level.axis, level.span, unit)
        parts.append((keys.to(q.dtype).transpose(1, 2), values.to(q.dtype).transpose(1, 2)))
        unit = level.span
    k, v = (hierarchy.join(each) for each in zip(*parts, strict=True))
    return attention(q, k, v, hierarchy.layout, sink_logits=sink_logits, return_lse=True, backend=backend)


def run_both(pattern, documents, pooling, backend, case: Case):
    tokens = Axis.tokens(case.queries, documents)
    hierarchy = build_hierarchy(pattern, tokens, BLOCK)
    if pooling == "learned":
        generator = torch.Generator().manual_seed(1)
        shape = (len(pattern.spans), case.kv_heads, case.head_dim)
        case.tensors["pool"] = torch.randn(shape, generator=generator, dtype=torch.float64)

    def run(function):
        leaves = {name: t.detach().clone().requires_grad_() for name, t in case.tensors.items()}
        out, lse = function(
            *(leaves[name] for name in "qkv"), leaves.get("pool"), sink_logits=leaves.get("sink_logits")
        )
        loss = (out.double() * case.out_weight.double()).sum() + (lse.double() * case.lse_weight).sum()
        loss.backward()
        gradients = {f"grad_{name}": leaf.grad.double() for name, leaf in leaves.items()}
        return {"out": out.detach().double(), "lse": lse.detach().double()} | gradients

    actual = run(lambda *args, **kwargs: hierarchical_attention(pattern, hierarchy, *args, **kwargs, backend=backend))
    expected = run(lambda q, k, v, *args, **kwargs: oracle(pattern, tokens, q, k, v, *args, **kwargs))
    return actual, expected


@pytest.mark.parametrize("backend", ["reference", "blocked"])
@pytest.mark.parametrize("pooling", ["mean", "learned"])
@pytest.mark.parametrize("documents", ["none", "packed", "short"])
@pytest.mark.parametrize("pattern", [TWO, THREE], ids=["two_levels", "three_levels"])
def test_outputs_and_all_gradients_equal_the_oracle(pattern, documents, pooling, backend):
    batch = 1 if documents == "none" else 2
    case = Case(LENGTH, LENGTH, batch=batch, kv_heads=2, group=2, head_dim=4)
    assert_same(*run_both(pattern, DOCUMENTS[documents], pooling, backend, case), torch.float64)


@pytest.mark.parametrize("group", [1, 4, 16])
def test_groups_of_heads_equal_the_oracle(group):
    case = Case(53, 53, kv_heads=1 if group == 16 else 2, group=group, head_dim=4)
    assert_same(*run_both(TWO, packing([33, 20]), "learned", "blocked", case), torch.float64)


@pytest.mark.parametrize("length", [2, 3, 4, 15, 16, 17, 33])
def test_ragged_lengths_equal_the_oracle(length):
    spans, reaches = ((2, 4), (5,)) if length >= 4 else ((2,), ())
    case = Case(length, length, kv_heads=2, group=2, head_dim=4)
    assert_same(*run_both(Hierarchical(2, spans, reaches, "learned"), None, "learned", "blocked", case), torch.float64)


def test_bfloat16_is_pooled_in_float32():
    """A mean of many bfloat16 keys keeps what a sum in bfloat16 would lose, autocast or not."""
    tokens = Axis.tokens(512)
    axis = Axis.summaries(tokens, 512)
    keys = (1 + torch.randn(1, 512, 1, 4, generator=torch.Generator().manual_seed(0)) / 8).bfloat16()
    scores = keys.float().sum(-1)
    for weights in (None, scores):
        with torch.autocast("cpu", torch.bfloat16):
            pooled = pool(keys, keys, weights, axis, 512)[0]
        expected = torch.full((512,), 1 / 512) if weights is None else scores[0, :, 0].softmax(0)
        assert pooled.dtype == torch.float32
        torch.testing.assert_close(pooled[0, 0, 0], expected @ keys[0, :, 0].float(), rtol=1e-5, atol=1e-6)


def test_a_summary_stands_in_the_middle_of_its_span():
    axis = Axis.summaries(Axis.tokens(20, packing([9, 11])), 4)
    assert middles(axis, 4).tolist() == [[2, 6, 11, 15, 19]]
    assert (axis.end > axis.start).tolist() == [[True, True, True, True, False]]


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

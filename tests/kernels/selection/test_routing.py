"""Selections against lists made query by query in Python, and the partition of a query's past that they rest on."""

import pytest
import torch

from kernels import Selection, block_means, document_starts, select
from kernels.selection.routing import choose_in_chunks, eligible_range, ranked
from kernels.selection.routing_health import union_of_neighbours
from tests.kernels.oracle import packing
from tests.kernels.routing_oracle import naive_choice, naive_mask, naive_summaries, window_start

DOCUMENTS = {
    "one_document": packing([150]),
    "packed": packing([70, 5, 75], [16, 100, 34]),
    "shorter_than_a_block": packing([3, 4, 9, 2, 120, 12]),
}
every_packing = pytest.mark.parametrize("documents", DOCUMENTS.values(), ids=DOCUMENTS)


def router(documents, selectors=2, dim=8, seed=0, integers=False):
    """Router queries and keys, float64; `integers`: small whole numbers, so that many scores are equal."""
    generator = torch.Generator().manual_seed(seed)
    shape = (documents.shape[0], selectors, documents.shape[1], dim)
    if integers:
        return [torch.randint(-1, 2, shape, generator=generator).double() for _ in range(2)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2)]


@every_packing
@pytest.mark.parametrize(("window", "block"), [(1, 16), (16, 16), (23, 16), (40, 32), (200, 16)])
def test_window_and_eligible_blocks_are_a_partition_of_the_past(documents, window, block):
    first = document_starts(documents)
    lowest, limit = eligible_range(first, window, block)
    for b in range(len(documents)):
        for t in range(documents.shape[1]):
            begin = max(window_start(t, window, block), int(first[b, t]))
            covered = list(range(begin, t + 1))
            for j in range(int(lowest[b, t]), int(limit[b, t])):
                visible = range(max(j * block, int(first[b, t])), (j + 1) * block)
                assert len(visible) > 0, "an eligible block holds a visible token"
                covered += visible
            assert sorted(covered) == list(range(int(first[b, t]), t + 1))


@every_packing
@pytest.mark.parametrize("block", [16, 32])
def test_block_means_and_their_gradient(documents, block):
    _, keys = router(documents)
    keys.requires_grad_()
    means = block_means(keys, document_starts(documents), block)
    torch.testing.assert_close(means, naive_summaries(keys, documents, block), rtol=0, atol=1e-14)
    weight = torch.randn(means.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    ours = torch.autograd.grad((means * weight).sum(), keys)[0]
    truth = torch.autograd.grad((naive_summaries(keys, documents, block) * weight).sum(), keys)[0]
    torch.testing.assert_close(ours, truth, rtol=0, atol=1e-14)


@every_packing
@pytest.mark.parametrize("first_block", [False, True])
@pytest.mark.parametrize(("top_k", "window"), [(1, 1), (2, 20), (3, 33), (20, 16)])
@pytest.mark.parametrize("integers", [False, True], ids=["random", "many_ties"])
def test_choice_is_the_naive_one(documents, first_block, top_k, window, integers):
    queries, keys = router(documents, integers=integers)
    first = document_starts(documents)
    summaries = block_means(keys, first, 16)
    chosen = select(
        queries, summaries, first, top_k=top_k, window=window, block=16, first_block=first_block, backend="blocked"
    ).chosen
    assert torch.equal(chosen, naive_choice(queries, summaries, documents, top_k, window, 16, first_block))


def test_pieces_choose_as_a_whole(monkeypatch):
    documents = DOCUMENTS["packed"]
    queries, keys = router(documents, integers=True)
    first = document_starts(documents)
    arguments = (queries, block_means(keys, first, 16), first, 3, 20, 16, False)
    whole = choose_in_chunks(*arguments)
    monkeypatch.setitem(choose_in_chunks.__globals__["_SCORES_PER_CHUNK"], "cpu", 7 * 9 * 4)
    assert torch.equal(choose_in_chunks(*arguments), whole)


def test_equal_scores_go_to_the_lower_block():
    documents = packing([96])
    zeros = torch.zeros(1, 1, 96, 4)
    signed = torch.where(torch.arange(6) % 2 == 0, 0.0, -0.0)[None, None, :, None].expand(1, 1, 6, 4)
    for summaries in (zeros[:, :, :6], signed):
        chosen = select(zeros + 1, summaries, document_starts(documents), top_k=2, window=1, block=16).chosen
        assert chosen[0, 0, 95].tolist() == [0, 1]


def test_ranks_order_as_scores_do():
    scores = torch.tensor([-torch.inf, -3e38, -1.5, -1e-45, 0.0, 1e-45, 2.0, 3e38, torch.inf])
    ranks = ranked(scores, torch.zeros(9, dtype=torch.int64))
    assert torch.equal(ranks, ranks.sort().values) and len(ranks.unique()) == 9
    assert ranked(scores[:1], torch.tensor([5]))[0] > torch.iinfo(torch.int64).min
    assert (ranked(torch.zeros(3), torch.arange(3)).diff() < 0).all()


@every_packing
def test_transpose_lists_every_choice_once(documents):
    queries, keys = router(documents)
    first = document_starts(documents)
    selection = select(queries, block_means(keys, first, 16), first, top_k=3, window=17, block=16)
    for b in range(selection.batch):
        for s in range(selection.selectors):
            offsets, chosen = selection.offsets[b, s].tolist(), selection.chosen[b, s].flatten()
            for j in range(len(offsets) - 1):
                listed = selection.entries[b, s, offsets[j] : offsets[j + 1]]
                assert torch.equal(listed, (chosen == j).nonzero().flatten().int())
            assert offsets[0] == 0 and offsets[-1] == int((chosen >= 0).sum())
            assert len(selection.entries[b, s].unique()) == len(chosen)


def test_more_choices_than_int32_counts_are_refused():
    chosen = torch.zeros(1, dtype=torch.int32).expand(1, 1, 1 << 27, 16)  # takes no memory
    with pytest.raises(ValueError, match="134,217,728 queries and 16 slots: must be fewer than 2,147,483,648 choices"):
        Selection.from_chosen(chosen, 1 << 27, 64)


@every_packing
def test_mask_and_pairs(documents):
    queries, keys = router(documents)
    first = document_starts(documents)
    selection = select(queries, block_means(keys, first, 16), first, top_k=2, window=17, block=16)
    mask = naive_mask(selection.chosen, documents, 16)
    assert torch.equal(selection.dense_mask(), mask)
    assert torch.equal(selection.pairs(), mask.sum((2, 3)))


@every_packing
@pytest.mark.parametrize("t", [37, 74, 99])
def test_later_tokens_and_other_documents_change_no_choice(documents, t):
    queries, keys = router(documents)
    first = document_starts(documents)

    def chosen(queries, keys):
        summaries = block_means(keys, first, 16)
        return select(queries, summaries, first, top_k=2, window=9, block=16, first_block=True).chosen

    other_queries, other_keys = router(documents, seed=1)
    before = chosen(queries, keys)
    for b in range(len(documents)):
        foreign = (torch.arange(documents.shape[1]) > t) | (documents[b] != documents[b, t])
        changed = foreign[None, :, None]
        after = chosen(torch.where(changed, other_queries, queries), torch.where(changed, other_keys, keys))
        assert torch.equal(after[b, :, ~foreign], before[b, :, ~foreign])


def test_control_an_earlier_token_does_change_a_choice():
    documents = packing([150])
    queries, keys = router(documents)
    first = document_starts(documents)
    chosen = lambda keys: select(queries, block_means(keys, first, 16), first, top_k=2, window=9, block=16).chosen  # noqa: E731
    loud = keys.clone()
    loud[:, :, 40] += 100 * queries[:, :, 140]
    assert not torch.equal(chosen(keys)[0, 0, 140], chosen(loud)[0, 0, 140])


def test_settings_that_cannot_be_are_named():
    documents = packing([40])
    queries, keys = router(documents)
    first = document_starts(documents)
    summaries = block_means(keys, first, 16)
    good = dict(top_k=2, window=8, block=16)
    for change, message in (
        (dict(top_k=0), "top_k=0: must be an integer >= 1"),
        (dict(window=1.5), "window=1.5"),
        (dict(block=48), "block=48: must be one of 16, 32, 64, 128"),
        (dict(backend="fast"), "backend='fast': must be one of auto, blocked, triton"),
        (dict(backend="triton"), "backend='triton' cannot serve this call"),
    ):
        with pytest.raises(ValueError, match=message):
            select(queries, summaries, first, **(good | change))
    with pytest.raises(ValueError, match="summaries"):
        select(queries, summaries[:, :, :1], first, **good)


def test_operator_passes_opcheck():
    documents = DOCUMENTS["packed"]
    queries, keys = router(documents)
    first = document_starts(documents)
    arguments = (queries, block_means(keys, first, 16), first, None, 3, 20, 16, True, 150, "blocked")
    torch.library.opcheck(torch.ops.farsight.select.default, arguments, test_utils=("test_schema", "test_faketensor"))


def test_a_choice_alone_makes_a_selection():
    documents = DOCUMENTS["packed"]
    queries, keys = router(documents)
    first = document_starts(documents)
    made = select(queries, block_means(keys, first, 16), first, top_k=2, window=9, block=16)
    again = Selection.from_chosen(made.chosen, 150, 16, first)
    assert all(torch.equal(a, b) for a, b in zip(made.tensors(), again.tensors(), strict=True))


def test_union_of_neighbours_counts_different_blocks():
    """Three queries in a row, two and an end: {0, 1} of three choices, {1, 2, 3} of four, {5} of one."""
    chosen = torch.tensor([[[[0, -1], [0, 1], [1, 2], [1, 3], [5, -1]]]], dtype=torch.int32)
    assert float(union_of_neighbours(chosen, 2)) == pytest.approx((2 + 3 + 1) / (3 + 4 + 1))
    alike = torch.tensor([3, 7], dtype=torch.int32).expand(1, 2, 64, 2)
    assert float(union_of_neighbours(alike, 8)) == 1 / 8
    nothing = torch.full((1, 1, 4, 2), -1, dtype=torch.int32)
    assert float(union_of_neighbours(nothing, 8)) == 0

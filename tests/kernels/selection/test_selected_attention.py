"""Attention on a Selection against dense softmax in float64 whose mask is built pair by pair."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from kernels import Selection, attention, block_mass, document_starts, merge
from kernels.backends import gathered
from kernels.selection.selected_attention import _backward, _forward
from tests.kernels.oracle import Case, assert_same, dense_attention, packing
from tests.kernels.routing_oracle import naive_mask, random_choice

DOCUMENTS = {
    "one_document": packing([100]),
    "packed": packing([50, 3, 47], [16, 70, 14]),
    "shorter_than_a_block": packing([3, 4, 9, 2, 70, 12]),
}


def selection_of(documents, selectors, slots=3, window=9, block=16, seed=0):
    chosen = random_choice(documents, selectors, slots, window, block, seed)
    return Selection.from_chosen(chosen, documents.shape[1], block, document_starts(documents))


def oracle(documents, selection):
    """A function as Case.run takes it: K/V heads are copied so that every selector has its own."""
    mask = naive_mask(selection.chosen, documents, selection.block)

    def function(q, k, v, sink_logits):
        repeat = selection.selectors // k.shape[1]
        k, v = (t.repeat_interleave(repeat, 1) for t in (k, v))
        return dense_attention(q, k, v, mask, q.shape[-1] ** -0.5, sink_logits)

    return function


def ours(selection, backend):
    return lambda q, k, v, s: attention(q, k, v, selection, sink_logits=s, return_lse=True, backend=backend)


@pytest.mark.parametrize("backend", ["blocked", "reference"])
@pytest.mark.parametrize("documents", DOCUMENTS.values(), ids=DOCUMENTS)
@pytest.mark.parametrize(("group", "share"), [(1, "group"), (2, "group"), (2, "head"), (4, "group"), (16, "group")])
def test_matches_the_oracle(documents, group, share, backend):
    case = Case(100, 100, batch=len(documents), group=group)
    selection = selection_of(documents, 2 if share == "group" else 2 * group)
    assert_same(case.run(ours(selection, backend)), case.run(oracle(documents, selection)), torch.float64)


@pytest.mark.parametrize(("dtype", "block"), [(torch.float32, 32), (torch.bfloat16, 16)])
def test_other_dtypes_and_blocks(dtype, block):
    documents = packing([60, 90])
    case, selection = Case(150, 150, group=2, dtype=dtype), selection_of(documents, 2, block=block)
    assert_same(case.run(ours(selection, "blocked")), case.run(oracle(documents, selection)), dtype)


def test_pieces_change_nothing(monkeypatch):
    documents = DOCUMENTS["packed"]
    case, selection = Case(100, 100, batch=2, group=2), selection_of(documents, 2)
    monkeypatch.setitem(gathered.ELEMENTS_PER_CHUNK, "cpu", 1)
    assert_same(case.run(ours(selection, "blocked")), case.run(oracle(documents, selection)), torch.float64)


@pytest.mark.parametrize("at_once", [1, 1 << 9, 1 << 18])
def test_lists_of_very_different_lengths(monkeypatch, at_once):
    """Of three sequences, one has all its queries choose block 0, one spreads them out, and one chooses nothing."""
    monkeypatch.setitem(gathered.ELEMENTS_PER_CHUNK, "cpu", at_once)
    documents = packing([100], [100], [100])
    spread = random_choice(documents, 2, 3, window=9, block=16)
    chosen = spread.clone()
    chosen[0] = torch.where((spread[0] >= 0).any(-1, keepdim=True), torch.tensor([0, -1, -1]), -1).int()
    chosen[2] = -1
    selection, case = Selection.from_chosen(chosen, 100, 16), Case(100, 100, batch=3, group=2, sinks=False)
    results = case.run(ours(selection, "blocked"))
    assert_same(results, case.run(oracle(documents, selection)), torch.float64)
    again = case.run(ours(selection, "blocked"))
    assert all(torch.equal(again[name], results[name]) for name in results)


def test_two_selections_merge_to_one_softmax():
    documents = packing([100])
    case = Case(100, 100, sinks=False)
    both = selection_of(documents, 2, slots=4)
    halves = []
    for part in (slice(0, 2), slice(2, 4)):
        halves.append(Selection.from_chosen(both.chosen[..., part].contiguous(), 100, 16, both.document_start))

    def merged(q, k, v, _):
        return merge([attention(q, k, v, half, return_lse=True) for half in halves])

    assert_same(case.run(merged), case.run(ours(both, "reference")), torch.float64)


@pytest.mark.parametrize("share", ["group", "head"])
def test_block_mass_is_the_attention_that_a_block_received(share):
    documents = DOCUMENTS["packed"]
    case = Case(100, 100, batch=2, group=2)
    selection = selection_of(documents, 2 if share == "group" else 4)
    q, k = case.tensors["q"], case.tensors["k"]
    heads = selection.selectors
    k_heads = k.repeat_interleave(heads // 2, 1)
    scores = (q.unflatten(1, (heads, -1)) @ k_heads[:, :, None].mT) * 8**-0.5
    lse = scores.logsumexp(-1)  # of all keys: more than the selection holds
    mask = naive_mask(selection.chosen, documents, 16)
    weights = torch.where(mask[:, :, None], (scores - lse[..., None]).exp(), 0.0).mean(2)
    blocks = torch.nn.functional.pad(weights, (0, 12)).unflatten(-1, (7, 16)).sum(-1)
    truth = blocks.gather(3, selection.chosen.long().clamp(min=0)) * (selection.chosen >= 0)
    mass = block_mass(q, k, lse.flatten(1, 2), selection)
    torch.testing.assert_close(mass, truth, rtol=0, atol=1e-14)
    assert not mass.requires_grad and (mass > 0).any()


def operator_inputs():
    documents = DOCUMENTS["packed"]
    case, selection = Case(100, 100, batch=2, group=2), selection_of(documents, 2)
    return case, selection, (selection.block, 0.3, "blocked")


def test_operators_pass_opcheck():
    case, selection, scalars = operator_inputs()
    q, k, v = (case.tensors[name] for name in "qkv")
    leaves = [t.clone().requires_grad_() for t in (q, k, v)]
    torch.library.opcheck(_forward, (*leaves, selection.tensors(), *scalars))
    out, lse = _forward(q, k, v, selection.tensors(), *scalars)
    arguments = (torch.ones_like(out), torch.ones_like(lse), q, k, v, out, lse, selection.tensors(), *scalars)
    torch.library.opcheck(_backward, arguments, test_utils=("test_schema", "test_faketensor"))
    mass = (q, k, lse, selection.tensors(), 16, 0.3, "blocked")
    torch.library.opcheck(torch.ops.farsight.block_mass.default, mass, test_utils=("test_schema", "test_faketensor"))


def test_compiles_to_one_graph_and_checkpoints_with_the_same_results():
    case, selection, _ = operator_inputs()
    plain = ours(selection, "blocked")
    expected = case.run(plain)
    torch.compiler.reset()
    compiled = case.run(torch.compile(plain, fullgraph=True, backend="aot_eager"))
    recomputed = case.run(lambda *tensors: checkpoint(plain, *tensors, use_reentrant=False))
    for name in expected:
        torch.testing.assert_close(compiled[name], expected[name], rtol=0, atol=1e-13)
        assert torch.equal(recomputed[name], expected[name])


def test_autocast_rounds_no_scores():
    case, selection, _ = operator_inputs()
    q, k, v = (case.tensors[name].float() for name in "qkv")
    expected = attention(q, k, v, selection)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(attention(q, k, v, selection), expected)


def test_flops_are_counted_over_visible_pairs():
    case, selection, _ = operator_inputs()
    q, k, v = (case.tensors[name].clone().requires_grad_() for name in "qkv")
    with FlopCounterMode(display=False) as counter:
        attention(q, k, v, selection).sum().backward()
    pairs = int(naive_mask(selection.chosen, DOCUMENTS["packed"], 16).sum()) * 2
    assert counter.get_total_flops() == (4 + 10) * 8 * pairs


def test_calls_that_cannot_be_are_named():
    case, selection, _ = operator_inputs()
    q, k, v = (case.tensors[name] for name in "qkv")
    for arguments, message in (
        ((q[:, :, :50], k, v), "q has 50 queries: must be the selection's, 100"),
        ((q, k[:, :, :50], v[:, :, :50]), "k has 50 keys"),
        ((q[:1], k[:1], v[:1]), "the selection has batch 2"),
        ((q[:, :3], k[:, :1], v[:, :1]), "the selection has 2 selectors: must be k's 1 heads or q's 3"),
        ((q.float(), k, v), "must have the same dtype"),
    ):
        with pytest.raises(ValueError, match=message):
            attention(*arguments, selection)
    with pytest.raises(ValueError, match="backend='fast'"):
        attention(q, k, v, selection, backend="fast")
    with pytest.raises(ValueError, match="sink_logits"):
        attention(q, k, v, selection, sink_logits=torch.zeros(3, dtype=torch.float64))

"""A NaN or an infinity reaches what sees it and nothing else: forward and backward, on every CPU backend."""

import pytest
import torch

from kernels import Axis, Selection, attention, block_mass, block_means, build_layout, document_starts, merge, select
from kernels.backends import direct
from kernels.layout.cached_keys import CachedKeys
from kernels.patterns import Window
from kernels.summaries.span_pooling import pool
from tests.kernels.oracle import PATTERNS, Case, brute_force_mask, packing
from tests.kernels.routing_oracle import naive_mask, random_choice

BACKENDS = ("reference", "blocked")
DOCUMENTS = packing([21, 30, 32])
LENGTH = DOCUMENTS.shape[1]
POISONED = 25
"""A key of the second document, in a tile of 16 that the first one reaches into."""

both_backends = pytest.mark.parametrize("backend", BACKENDS)
every_pattern = pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS)
bad_numbers = pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf], ids=str)


def run(tensors, layout, backend="auto"):
    """out, lse and the gradients of q, k and v; tensors: q, k, v, grad_out."""
    *leaves, grad_out = tensors
    leaves = [t.clone().requires_grad_() for t in leaves]
    out, lse = attention(*leaves, layout, return_lse=True, backend=backend)
    out.backward(grad_out)
    return out.detach(), lse.detach(), *(leaf.grad for leaf in leaves)


def poison(tensors, which, place, bad):
    """A copy of the tensors `[batch, heads, length, head_dim]`, one of which holds `bad` in row `place`."""
    tensors = [t.clone() for t in tensors]
    tensors[which][:, :, place] = bad
    return tensors


def assert_untouched(actual, expected, rows):
    """`[batch, heads, rows, ...]` agree where `rows` `[batch, 1, rows]` hold."""
    rows = rows.expand(actual.shape[:3])
    limit = 1e-9 if actual.dtype == torch.float64 else 1e-4
    torch.testing.assert_close(actual[rows], expected[rows], rtol=limit, atol=limit)


def assert_contained(tensors, mask, layout, backend, bad, place=POISONED):
    """Poisons row `place` of v, k, q and grad_out in turn; mask `[1, 1, queries, keys]`."""
    plain = run(tensors, layout, backend)
    sees, seen = mask[..., place], mask[..., place, :]  # queries that see the key; keys that the query sees
    # Keys that share a query with a key: their gradients depend on its value.
    beside = (mask & sees[..., None]).any(-2)
    assert sees.any() and not sees.all() and seen.any() and not seen.all()

    out, lse, *grads = run(poison(tensors, 2, place, bad), layout, backend)
    assert_untouched(out, plain[0], ~sees)
    assert not out[sees.expand(out.shape[:3])].isfinite().any()
    torch.testing.assert_close(lse, plain[1])
    for grad, expected, reached in zip(grads, plain[2:], (sees, beside, torch.zeros_like(sees)), strict=True):
        assert_untouched(grad, expected, ~reached)
    assert not grads[0][sees.expand(out.shape[:3])].isfinite().any()

    out, lse, *grads = run(poison(tensors, 1, place, torch.nan), layout, backend)
    assert_untouched(out, plain[0], ~sees)
    assert_untouched(lse, plain[1], ~sees)
    assert out[sees.expand(out.shape[:3])].isnan().all() and lse[sees.expand(lse.shape)].isnan().all()
    for grad, expected, reached in zip(grads, plain[2:], (sees, beside, beside), strict=True):
        assert_untouched(grad, expected, ~reached)
        assert grad[reached.expand(grad.shape[:3])].isnan().all()

    only = torch.zeros_like(sees)
    only[..., place] = True
    for which in (0, 3):
        out, lse, *grads = run(poison(tensors, which, place, torch.nan), layout, backend)
        if which == 0:
            assert_untouched(out, plain[0], ~only)
            assert_untouched(lse, plain[1], ~only)
            assert out[:, :, place].isnan().all()
        for grad, expected, reached in zip(grads, plain[2:], (only, seen, seen), strict=True):
            assert_untouched(grad, expected, ~reached)
        assert grads[2][seen.expand(grads[2].shape[:3])].isnan().all()


def inputs(kv_heads=2, group=2, length=LENGTH, head_dim=8, dtype=torch.float64):
    case = Case(length, length, kv_heads=kv_heads, group=group, head_dim=head_dim, dtype=dtype, sinks=False)
    return [*(case.tensors[name] for name in "qkv"), case.out_weight]


@both_backends
@every_pattern
@bad_numbers
def test_only_queries_that_see_it(bad, pattern, backend):
    axis = Axis.tokens(LENGTH, DOCUMENTS)
    layout, mask = build_layout(pattern, axis, block=16), brute_force_mask(pattern, axis)
    assert_contained(inputs(), mask, layout, backend, bad)


@both_backends
def test_the_rows_of_one_tile_and_two_documents(backend):
    axis = Axis.tokens(40, packing([20, 20]))
    layout, mask = build_layout(Window(8), axis, block=16), brute_force_mask(Window(8), axis)
    assert_contained(inputs(1, 1, 40), mask, layout, backend, torch.nan)


@both_backends
@pytest.mark.parametrize("bad", [torch.inf, -torch.inf])
def test_a_visible_infinity_keeps_its_sign(bad, backend):
    tensors = poison(inputs(), 2, POISONED, bad)
    axis = Axis.tokens(LENGTH, DOCUMENTS)
    out = attention(*tensors[:3], build_layout(Window(9), axis, block=16), backend=backend)
    sees = brute_force_mask(Window(9), axis)[..., POISONED].expand(out.shape[:3])
    assert (out[sees] == bad).all()


@both_backends
def test_one_channel_of_a_value_is_one_channel_of_the_output(backend):
    tensors = inputs()
    tensors[2][:, :, POISONED, 3] = torch.nan
    out = attention(*tensors[:3], build_layout(Window(9), Axis.tokens(LENGTH, DOCUMENTS), block=16), backend=backend)
    assert out[:, :, POISONED, 3].isnan().all() and out[..., :3].isfinite().all() and out[..., 4:].isfinite().all()


@both_backends
@pytest.mark.parametrize("selectors", [2, 4])
def test_chosen_blocks(selectors, backend):
    documents = packing([40, 100])  # the second document begins within a block that its queries choose
    chosen = random_choice(documents, 1, 4, window=9, block=16).expand(-1, selectors, -1, -1).contiguous()
    selection = Selection.from_chosen(chosen, 140, 16, document_starts(documents))
    mask, tensors = naive_mask(chosen, documents, 16)[:, :1], inputs(length=140)
    assert_contained(tensors, mask, selection, backend, torch.nan, place=100)
    plain = run(tensors, selection, backend)
    assert mask[..., 40].any() and not mask[..., 38].any()  # of block 2 the second document's keys are seen alone
    for which in (1, 2):
        results = run(poison(tensors, which, 38, torch.nan), selection, backend)
        for actual, expected in zip(results, plain, strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)
    if backend == "blocked":
        q, k, _, _ = poison(tensors, 1, 38, torch.nan)
        assert block_mass(q, k, plain[1], selection).isfinite().all()


def test_a_gradient_stays_among_chosen_keys():
    documents = packing([40, 60])
    chosen = random_choice(documents, 2, 4, window=9, block=16)
    chosen[:, :, 90] = torch.tensor([2, 3, -1, -1])  # in block 2 its document begins at key 40
    selection, tensors = Selection.from_chosen(chosen, 100, 16, document_starts(documents)), inputs(length=100)
    plain = run(tensors, selection)
    _, _, _, *grads = run(poison(tensors, 3, 90, torch.nan), selection)
    for grad, expected in zip(grads, plain[3:], strict=True):
        assert grad[:, :, 40:64].isnan().all()
        hidden = torch.ones(100, dtype=torch.bool)
        hidden[40:64] = False
        torch.testing.assert_close(grad[:, :, hidden], expected[:, :, hidden], rtol=1e-9, atol=1e-9)


def test_decoding_reads_hidden_keys_for_nothing():
    q, k, v, _ = inputs(length=30)
    mask = torch.rand(1, 1, 30, 30, generator=torch.Generator().manual_seed(0)) < 0.5
    mask[..., 7] = torch.arange(30) % 2 == 0
    plain = direct.attend(q, [CachedKeys(k, v, mask)], 0.4)
    for which in range(2):
        keys = [k.clone(), v.clone()]
        keys[which][:, :, 7] = torch.nan
        out, lse = direct.attend(q, [CachedKeys(*keys, mask)], 0.4)
        torch.testing.assert_close(out[:, :, 1::2], plain[0][:, :, 1::2])
        torch.testing.assert_close(lse[:, :, 1::2], plain[1][:, :, 1::2])
        assert out[:, :, ::2].isnan().all()


def test_merge_takes_nothing_of_an_empty_part():
    out, lse = torch.randn(2, 3, 4, dtype=torch.float64).requires_grad_(), torch.randn(2, 3, dtype=torch.float64)
    lse.requires_grad_()
    nothing = torch.full((2, 3, 4), torch.nan, dtype=torch.float64), torch.full((2, 3), -torch.inf).double()
    merged, total = merge([(out, lse), nothing])
    torch.testing.assert_close(merged, out)
    torch.testing.assert_close(total, lse)
    (merged.sum() + total.sum()).backward()
    assert (out.grad == 1).all() and torch.allclose(lse.grad, torch.ones_like(lse))
    seen = torch.full((2, 3), torch.nan, dtype=torch.float64)
    assert merge([(out, lse), (nothing[0], seen)])[1].isnan().all()


def test_a_block_mean_takes_its_own_document_alone():
    documents = packing([20, 28])
    keys = torch.randn(1, 1, 48, 4, dtype=torch.float64)
    expected = block_means(keys, document_starts(documents), 16)
    keys[:, :, 17] = torch.nan
    torch.testing.assert_close(block_means(keys, document_starts(documents), 16), expected)


def test_scores_that_a_query_may_not_choose_by_change_no_choice():
    generator = torch.Generator().manual_seed(0)
    queries = torch.randn(1, 2, 128, 8, generator=generator)
    summaries = torch.randn(1, 2, 8, 8, generator=generator)
    document_start = torch.zeros(1, 128, dtype=torch.int32)
    settings = dict(top_k=2, window=9, block=16)
    plain = select(queries, summaries, document_start, **settings).chosen
    summaries[:, :, 4] = torch.nan  # eligible from query 88 on
    chosen = select(queries, summaries, document_start, **settings).chosen
    assert torch.equal(chosen[:, :, :88], plain[:, :, :88]) and (chosen[:, :, 88:] == 4).any(-1).all()


@pytest.mark.parametrize("learned", [False, True])
def test_an_empty_span_pools_nothing(learned):
    """Documents of 6 and 10 tokens hold 1 and 2 spans of 4: the slot of tokens 4 to 7 begins no span."""
    axis = Axis.summaries(Axis.tokens(16, packing([6, 10])), 4)
    assert (axis.end == axis.start).any()
    keys, values = (torch.randn(1, 16, 2, 4, dtype=torch.float64) for _ in range(2))
    keys[:, 5] = torch.nan
    keys, values = keys.requires_grad_(), values.requires_grad_()
    scores = keys.sum(-1) if learned else None
    pooled = pool(keys, values, scores, axis, 4)
    assert all(each.isfinite().all() for each in pooled)
    sum(each.sum() for each in pooled).backward()
    assert keys.grad.isfinite().all() and values.grad.isfinite().all()

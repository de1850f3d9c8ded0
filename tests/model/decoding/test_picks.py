"""Which blocks a routed layer's cache picks and reads: those of one pass over the whole text, and no others."""

import pytest
import torch
from torch.nn import functional as F

from kernels.selection import routing
from model import Cache, Transformer
from model.attention.routed import cache as decoding_routed
from model.decoding import expected_bytes
from tests.model.decoding.test_parity import (
    BLOCK,
    LIMITS,
    PLANS,
    build,
    cached_logits,
    full_logits,
    random_tokens,
    routed,
)
from tests.model.small import config, lively, plan

ROUTED_PLANS = [name for name in PLANS if "routed" in name or "native" in name]


@pytest.mark.parametrize("name", ROUTED_PLANS)
def test_a_cache_picks_the_blocks_that_one_pass_picks(name, monkeypatch):
    """All of them, in every layer, and for every token: no near miss that a small difference in logits would hide. In
    float64: two float32 scores can be so close that rounding alone decides between them."""
    whole, cached, plain, in_steps = [], [], routing.choose_in_chunks, routing.choose
    model, tokens = build(name), random_tokens(2, 100)
    with monkeypatch.context() as patch:
        patch.setattr(routing, "choose_in_chunks", lambda *rest: whole.append(plain(*rest)) or whole[-1])
        full_logits(model, tokens)
    patched = lambda *rest: cached.append(in_steps(*rest)) or cached[-1]  # noqa: E731
    monkeypatch.setattr("model.attention.routed.cache.choose", patched)
    for chunk in (1, 7, BLOCK + 1, 70):
        cached.clear()
        cached_logits(model, tokens, chunk)
        for layer, expected in enumerate(whole):
            found = [F.pad(each, (0, expected.shape[3] - each.shape[3]), value=-1) for each in cached[layer::2]]
            picked = torch.cat(found, 2)
            first = expected.shape[2] - picked.shape[2]  # no block can be picked before, and nobody was asked
            assert (expected[:, :, :first] == -1).all() and (picked != -1).any()
            assert torch.equal(picked.sort(-1).values, expected[:, :, first:].sort(-1).values), (chunk, layer)


@pytest.mark.parametrize("share", ["group", "head"])
def test_equal_scores_are_decided_as_in_one_pass(share):
    """Every block has the same keys, and so the same score: the first ones are picked, by a cache too."""
    model = lively(Transformer(config(), plan(routed(top_k=2, share=share), block=BLOCK))).eval()
    for parameter in (layer.self_attn.k_proj.weight for layer in model.layers):
        torch.nn.init.zeros_(parameter)
    model, tokens = model.double(), random_tokens(1, 150)
    assert (cached_logits(model, tokens, 1) - full_logits(model, tokens)).abs().max() <= 1e-12


def test_nothing_but_the_window_and_the_picked_blocks_is_read():
    """Whatever else lies in the store, here what is not a number, a token's result is the same."""
    model, tokens = build("routed"), random_tokens(1, 150)
    found = []
    for spoil in (False, True):
        cache, chosen = Cache(model, 1), []
        cache.extend(tokens[:, :-1])
        for layer in cache._layers if spoil else []:
            choose = layer._choose

            def choose_and_spoil(*given, store=layer.tokens, choose=choose, chosen=chosen):
                picks = choose(*given)
                unread = torch.ones(144 // BLOCK, dtype=torch.bool)
                for block in picks.unique().tolist():
                    unread[block] = False
                for held in (store._k, store._v):
                    held[:, :, :144].unflatten(2, (-1, BLOCK))[:, :, unread] = torch.nan
                chosen.append(picks)
                return picks

            layer._choose = choose_and_spoil
        found.append(cache.extend(tokens[:, -1:]))
        assert len(chosen) == (2 if spoil else 0)
    torch.testing.assert_close(*found, rtol=0, atol=LIMITS[torch.float64])


@pytest.mark.parametrize("name", ROUTED_PLANS)
def test_a_batch_of_one_length_reads_exactly_what_is_expected(name):
    model = lively(Transformer(config(layers=3, max_length=4096), PLANS[name])).eval()
    for batch in (1, 3):
        tokens, cache = random_tokens(batch, 480), Cache(model, batch)
        cache.extend(tokens[:, :-1])
        stored, read = expected_bytes(model, 479, batch)
        assert cache.bytes_stored == stored
        cache.extend(tokens[:, -1:])
        assert cache.bytes_read == read


@pytest.mark.parametrize("name", ["routed", "routed_by_indexer_and_head", "native_sparse"])
def test_the_triton_kernel_of_training_serves_long_chunks(name, monkeypatch):
    """In Triton's interpreter where there is no GPU: more keys than queries, in a store with room to spare."""
    pytest.importorskip("triton")
    model = lively(Transformer(config(head_dim=32, layers=1), PLANS[name])).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.5 if parameter.dim() == 2 else 1)
    tokens = random_tokens(1, 60)
    whole, calls = full_logits(model, tokens), []
    attend = decoding_routed.attention
    monkeypatch.setattr(decoding_routed, "choose_backend", lambda *_: "triton")
    monkeypatch.setattr(decoding_routed, "MAX_UNTILED_TOKENS", 8 if torch.cuda.is_available() else -1)
    monkeypatch.setattr(decoding_routed, "attention", lambda *a, **b: calls.append(1) or attend(*a, **b))
    for layer in model.layers:
        layer.self_attn.core.backend = "triton"
    assert (cached_logits(model, tokens, 30) - whole).abs().max() <= 1e-5 and calls

"""Token losses against a naive loop: one token of one document at a time, under a dense oracle."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch

from kernels.patterns import BlockSparse, Dense, Fixed, NativeSparse, Routed, Strided, Window
from model.evaluation import LossStore, Protocol, token_losses
from tests.model.evaluation.documents import PROTOCOLS, Documents, build, naive, run


@pytest.mark.parametrize("name", PROTOCOLS)
@pytest.mark.parametrize("pattern", [Window(9, 2), Dense(), Fixed(8, 2)], ids=["window", "dense", "fixed"])
def test_equals_a_naive_loop(pattern, name, monkeypatch):
    network, documents = build(pattern), Documents(31, 1, 13, 2, 0, 24)
    expected = naive(network, documents, PROTOCOLS[name], monkeypatch)
    nats = sum(loss.sum() for loss in expected)
    tokens = 30 + 12 + 1 + 23
    for tokens_at_once in (1, 30, 1000):
        row = run(network, documents, PROTOCOLS[name], tokens_at_once)
        assert row.tokens_scored == tokens and row.documents == 6 and row.bytes == 3 * tokens
        assert row.nll_nats == pytest.approx(nats, abs=1e-6), tokens_at_once
        assert row.loss == pytest.approx(nats / tokens, abs=1e-6), tokens_at_once
        assert row.perplexity == pytest.approx(math.exp(nats / tokens), rel=1e-6), tokens_at_once
        assert row.bits_per_byte == pytest.approx(nats / math.log(2) / (3 * tokens), abs=1e-6), tokens_at_once


def test_every_single_token_has_the_naive_loops_loss(monkeypatch):
    network, documents, protocol = build(), Documents(31, 13, 24), PROTOCOLS["sliding"]
    expected = naive(network, documents, protocol, monkeypatch)
    for actual, wanted in zip(token_losses(network, documents, protocol, tokens_at_once=64), expected, strict=True):
        np.testing.assert_allclose(actual, wanted, rtol=0, atol=1e-6)


def test_protocols_differ_where_documents_exceed_the_window():
    network, documents = build(Dense()), Documents(60)
    losses = sorted(run(network, documents, protocol).loss for protocol in PROTOCOLS.values())
    assert all(higher - lower > 1e-3 for lower, higher in pairwise(losses))


def test_the_beginning_of_document_token_is_read_but_never_scored():
    network, documents = build(), Documents(2)
    row = run(network, documents, PROTOCOLS["whole"])
    assert row.tokens_scored == 1
    zero = torch.zeros(1, 1, dtype=torch.int64)
    hidden = network(
        torch.from_numpy(documents.tokens(0)[:1].astype(np.int64))[None], zero, network.build_layouts(None, 1)
    )
    expected = -network.logits(hidden)[0, 0].log_softmax(-1)[int(documents.tokens(0)[1])]
    assert row.nll_nats == pytest.approx(float(expected.detach()), abs=1e-9)


def test_documents_without_a_token_to_score_are_refused():
    with pytest.raises(ValueError, match="no document has a token to score"):
        run(build(), Documents(1, 0, 1), PROTOCOLS["whole"])


def test_a_window_beyond_the_models_length_is_refused_before_any_work():
    network = build(max_length=20)
    with pytest.raises(ValueError, match=r"protocol\.name=whole needs sequences of 30 tokens: the model takes 20"):
        run(network, Documents(5, 31), PROTOCOLS["whole"], progress=lambda _: pytest.fail("work was done"))
    assert run(network, Documents(5, 21), PROTOCOLS["whole"]).tokens_scored == 24
    with pytest.raises(ValueError, match="needs sequences of 25 tokens"):
        run(network, Documents(31), Protocol("sliding", 25, 5))
    assert run(network, Documents(31), PROTOCOLS["sliding"]).tokens_scored == 30


def test_evaluation_leaves_the_model_as_it_was():
    network = build()
    before = {name: t.clone() for name, t in network.state_dict().items()}
    for training in (True, False):
        network.train(training)
        run(network, Documents(20), PROTOCOLS["whole"])
        assert network.training is training
    assert all(torch.equal(t, before[name]) for name, t in network.state_dict().items())
    assert all(p.grad is None for p in network.parameters())


def test_progress_adds_up_to_the_tokens_scored():
    told = []
    row = run(build(), Documents(31, 1, 13, 24), PROTOCOLS["sliding"], tokens_at_once=20, progress=told.append)
    assert len(told) > 3 and sum(told) == row.tokens_scored


ROUTED = dict(
    **dict(window=5, block=16, top_k=2, router="indexer", share="group", first_block=True),
    indexer_dim=4,
)


@pytest.mark.parametrize(
    "pattern",
    [
        *(Window(9, 2), Dense(), Fixed(8, 2), BlockSparse(6, 1, 1, 1), Strided(5, 9, align="sequence")),
        Routed(**ROUTED),
        NativeSparse(**ROUTED, summary_span=8, pooling="mean", combine="gates"),
    ],
    ids=lambda pattern: type(pattern).__name__,
)
def test_a_document_longer_than_what_is_read_at_once_is_read_in_chunks(pattern, monkeypatch):
    network, documents = build(pattern, max_length=500), Documents(301, 13, 40)
    sizes = []
    run_layers = network._run
    monkeypatch.setattr(
        network, "_run", lambda tokens, *rest: sizes.append(tokens.numel()) or run_layers(tokens, *rest)
    )
    told = []
    whole = token_losses(network, documents, PROTOCOLS["whole"], tokens_at_once=400)
    together = pattern.anchor == "document"
    assert sizes == ([300 + 12 + 39] if together else [300, 12, 39])
    sizes.clear()
    chunked = token_losses(network, documents, PROTOCOLS["whole"], tokens_at_once=24, progress=told.append)
    assert max(sizes) == 24 and told[:13] == [24] * 12 + [12] and sum(told) == 300 + 12 + 39
    for actual, wanted in zip(chunked, whole, strict=True):
        np.testing.assert_allclose(actual, wanted, rtol=0, atol=1e-9)


# Usual bugs, each by name


def test_a_document_as_long_as_the_window_or_shorter_than_the_stride_is_scored_whole():
    network = build(Dense())
    for length in (2, 4, 5, 6, 12, 13):  # stride 5, window 12; a document of 13 tokens gives 12 to read
        whole, sliding = (run(network, Documents(length), PROTOCOLS[name]) for name in ("whole", "sliding"))
        assert whole.tokens_scored == sliding.tokens_scored == length - 1
        assert whole.nll_nats == pytest.approx(sliding.nll_nats, abs=1e-9)
    longer = (run(network, Documents(14), PROTOCOLS[name]).nll_nats for name in ("whole", "sliding"))
    assert abs(next(longer) - next(longer)) > 1e-4


def test_logits_predict_the_next_token_not_their_own():
    """A model that can only copy: its own token is certain, so a loss that forgot to shift would be near 0."""
    network = build()
    with torch.no_grad():
        for layer in network.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        network.embed_tokens.weight.copy_(3 * torch.nn.functional.normalize(torch.randn(64, 16), dim=-1))
        network.norm.weight.fill_(20.0)
    documents = Documents(200)
    repeats = int((np.diff(documents.tokens(0).astype(int)) == 0).sum())
    (losses,) = token_losses(network, documents, PROTOCOLS["whole"], tokens_at_once=300)
    assert losses.mean() > 5 and int((losses < 0.1).sum()) <= repeats + 3


def test_the_loss_is_over_exactly_the_tokens_that_bytes_are_counted_for():
    """No truncation: a document 50 times the window is scored to its last token."""
    row = run(build(), Documents(601), PROTOCOLS["sliding"], tokens_at_once=100)
    assert row.tokens_scored == 600 and row.bytes == 1800


# Proof against arithmetic


@pytest.mark.parametrize(("vocabulary", "tokens_per_byte"), [(16, 2), (256, 1), (65536, 0.5)])
def test_bits_per_byte_of_a_uniform_model_do_not_depend_on_the_tokenizer(vocabulary, tokens_per_byte):
    """The same 240 bytes in half bytes, bytes and pairs of bytes: 8 bits a byte, by three vocabularies."""
    network = build(vocabulary=vocabulary, max_length=1024)
    torch.nn.init.zeros_(network.embed_tokens.weight)  # tied: every logit is 0
    documents = Documents(int(240 * tokens_per_byte) + 1)
    documents.documents = [document.astype(np.int64) % vocabulary for document in documents.documents]
    documents.bytes, documents.words = [240], [40]
    row = run(network, documents, PROTOCOLS["sliding"])
    assert row.bits_per_byte == pytest.approx(8, abs=1e-12)
    assert row.word_perplexity == pytest.approx(256**6, rel=1e-9)


# What is kept for a restart


class Interruption(Exception):
    pass


def interrupt_after(tokens: int):
    """A progress that stops the scoring as a kill would: between two batches."""
    total = 0

    def progress(more: int) -> None:
        nonlocal total
        total += more
        if total >= tokens:
            raise Interruption

    return progress


def test_finished_documents_are_not_scored_again(tmp_path, monkeypatch):
    network, documents, store = build(), Documents(31, 13, 24, 2, 40), LossStore(tmp_path / "losses")
    expected = token_losses(network, documents, PROTOCOLS["sliding"], tokens_at_once=1)
    arguments = dict(tokens_at_once=1, store=store)
    with pytest.raises(Interruption):
        token_losses(network, documents, PROTOCOLS["sliding"], progress=interrupt_after(50), **arguments)
    assert sorted(file.name for file in store.folder.iterdir()) == ["000000.npy", "000001.npy"]

    read, told = [], []
    run_layers = network._run
    monkeypatch.setattr(network, "_run", lambda tokens, *rest: read.append(tokens.numel()) or run_layers(tokens, *rest))
    found = token_losses(network, documents, PROTOCOLS["sliding"], progress=told.append, **arguments)
    assert sum(told) == 30 + 12 + 23 + 1 + 39
    assert sum(read) == sum(s.stop - s.start for n in (24, 2, 40) for s in PROTOCOLS["sliding"].segments(n))
    for actual, wanted in zip(found, expected, strict=True):
        assert np.array_equal(actual, wanted)


def test_a_half_written_file_is_no_finished_document(tmp_path):
    network, documents, store = build(), Documents(31, 13), LossStore(tmp_path)
    (tmp_path / "000000.partial").write_bytes(b"half")
    losses = token_losses(network, documents, PROTOCOLS["whole"], tokens_at_once=64, store=store)
    assert np.isfinite(np.concatenate(losses)).all()

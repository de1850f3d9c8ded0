"""evaluate() against a naive loop: one token of one document at a time, under a dense oracle."""

import math
from dataclasses import asdict

import numpy as np
import pytest
import torch

import model.attention.plain
from kernels import Axis
from kernels.patterns import Dense, Fixed, Pattern, Window
from model import Transformer
from model.evaluation import Protocol, evaluate
from model.evaluation.perplexity import EDGES, summarize
from tests.kernels.oracle import brute_force_mask, dense_attention
from tests.model.small import config, lively, plan


class Documents:
    """Random documents of the given lengths, the beginning-of-document token included; its text is 3 bytes a token."""

    def __init__(self, *lengths: int) -> None:
        generator = np.random.default_rng(0)
        self.documents = [generator.integers(1, 64, n).astype(np.uint16) for n in lengths]
        for document in self.documents:
            document[:1] = 0
        self.bytes = [max(3 * (n - 1), 0) for n in lengths]

    def __len__(self) -> int:
        return len(self.documents)

    def tokens(self, document: int) -> np.ndarray:
        return self.documents[document]


def build(pattern: Pattern | None = None, **changes) -> Transformer:
    return lively(Transformer(config(**changes), plan(pattern or Window(9, 2))).double())


def run(model, documents, protocol, tokens_at_once=64, long_document=1024, **arguments):
    return evaluate(model, documents, protocol, tokens_at_once=tokens_at_once, long_document=long_document, **arguments)


def first_token_read(protocol: Protocol, token: int) -> int:
    """Where the window begins from which `token` is to be predicted: the definition, once more."""
    if protocol.name == "whole":
        return 0
    if protocol.name == "chunked":
        return (token - 1) // protocol.window * protocol.window
    return max(0, math.ceil((token - protocol.window) / protocol.stride)) * protocol.stride


@torch.no_grad()
def naive(model: Transformer, documents: Documents, protocol: Protocol, monkeypatch) -> list[np.ndarray]:
    """Nats of every token: each from a pass of its own over just the tokens that it may be predicted from."""
    losses = []
    with monkeypatch.context() as patch:
        oracle = lambda q, k, v, mask, **_: dense_attention(q, k, v, mask, q.shape[-1] ** -0.5)  # noqa: E731
        patch.setattr(attention_module, "attention", oracle)
        for d in range(len(documents)):
            tokens, nats = torch.from_numpy(documents.tokens(d).astype(np.int64)), []
            for token in range(1, len(tokens)):
                context = tokens[first_token_read(protocol, token) : token][None]
                axis = Axis.tokens(context.shape[1])
                masks = [brute_force_mask(model.plan.pattern(layer, 2), axis) for layer in range(2)]
                hidden = model(context, torch.arange(context.shape[1])[None], masks)[0, -1]
                nats.append(-float(model.logits(hidden).log_softmax(-1)[tokens[token]]))
            losses.append(np.array(nats))
    return losses


attention_module = model.attention.plain
PROTOCOLS = {
    "whole": Protocol("whole", None, None),
    "sliding": Protocol("sliding", 12, 5),
    "sliding_by_one": Protocol("sliding", 7, 1),
    "chunked": Protocol("chunked", 12, None),
}


@pytest.mark.parametrize("tokens_at_once", [1, 30, 1000])
@pytest.mark.parametrize("name", PROTOCOLS)
@pytest.mark.parametrize("pattern", [Window(9, 2), Dense(), Fixed(8, 2)], ids=["window", "dense", "fixed"])
def test_equals_a_naive_loop(pattern, name, tokens_at_once, monkeypatch):
    network, documents = build(pattern), Documents(31, 1, 13, 2, 0, 24)
    expected = naive(network, documents, PROTOCOLS[name], monkeypatch)
    row = run(network, documents, PROTOCOLS[name], tokens_at_once)
    nats = sum(loss.sum() for loss in expected)
    tokens = 30 + 12 + 1 + 23
    assert row.tokens_scored == tokens and row.documents == 6 and row.bytes == 3 * tokens
    assert row.nll_nats == pytest.approx(nats, abs=1e-6)
    assert row.loss == pytest.approx(nats / tokens, abs=1e-6)
    assert row.perplexity == pytest.approx(math.exp(nats / tokens), rel=1e-6)
    assert row.bits_per_byte == pytest.approx(nats / math.log(2) / (3 * tokens), abs=1e-6)


def test_every_single_token_has_the_naive_loops_loss(monkeypatch):
    network, documents, protocol = build(), Documents(31, 13, 24), PROTOCOLS["sliding"]
    expected = naive(network, documents, protocol, monkeypatch)
    seen = []
    monkeypatch.setattr(
        "model.evaluation.perplexity.summarize", lambda losses, *rest: seen.extend(losses) or summarize(losses, *rest)
    )
    run(network, documents, protocol)
    for actual, wanted in zip(seen, expected, strict=True):
        np.testing.assert_allclose(actual, wanted, rtol=0, atol=1e-6)


def test_protocols_differ_where_documents_exceed_the_window():
    network, documents = build(Dense()), Documents(60)
    losses = [run(network, documents, protocol).loss for protocol in PROTOCOLS.values()]
    assert len({round(loss, 6) for loss in losses}) == len(losses)


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


# The row, from known losses


def losses_of(*lengths: int) -> list[np.ndarray]:
    generator = np.random.default_rng(1)
    return [generator.gamma(2.0, size=n) * (1 + 500 / (500 + np.arange(n))) for n in lengths]


def row_of(losses, long_document=1024):
    return summarize(losses, [4 * len(loss) for loss in losses], PROTOCOLS["whole"], long_document)


def test_bits_per_byte_and_perplexity_are_plain_arithmetic():
    row = summarize([np.array([1.0, 2.0]), np.array([3.0])], [5, 7], PROTOCOLS["whole"], 1024)
    assert (row.nll_nats, row.tokens_scored, row.bytes, row.loss) == (6.0, 3, 12, 2.0)
    assert row.bits_per_byte == pytest.approx(6 / math.log(2) / 12)
    assert row.perplexity == pytest.approx(math.e**2)


def test_a_hopeless_loss_gives_a_finite_perplexity():
    assert math.isfinite(summarize([np.array([1e6])], [1], PROTOCOLS["whole"], 1024).perplexity)


def test_buckets_add_up_to_the_whole():
    row = row_of(losses_of(3000, 512, 513, 10, 1024, 2500))
    buckets = row.by_position
    assert [(b.start, b.stop) for b in buckets] == [(0, 512), (512, 1024), (1024, 2048), (2048, 4096)]
    assert [b.tokens for b in buckets] == [5 * 512 + 10, 3 * 512 + 1, 2 * 1024, 952 + 452]
    assert sum(b.tokens for b in buckets) == row.tokens_scored
    assert sum(b.tokens * b.loss for b in buckets) == pytest.approx(row.nll_nats, rel=1e-12)


def test_a_bucket_is_the_mean_over_its_positions():
    losses = losses_of(1500, 700)
    second = row_of(losses).by_position[1]
    assert second.loss == pytest.approx(np.concatenate([loss[512:1024] for loss in losses]).mean(), rel=1e-12)


def test_edges_rise_by_powers_of_two():
    assert EDGES[:4] == (0, 512, 1024, 2048) and list(EDGES) == sorted(set(EDGES))


def test_bootstrap_bounds_contain_the_mean_and_narrow_with_more_documents():
    few, many = row_of(losses_of(*[900] * 5)), row_of(losses_of(*[900] * 80))
    for bucket in few.by_position + many.by_position:
        assert bucket.low < bucket.loss < bucket.high
    width = lambda row: row.by_position[0].high - row.by_position[0].low  # noqa: E731
    assert width(many) < 0.5 * width(few)


def test_bootstrap_bounds_of_one_document_are_its_mean():
    bucket = row_of(losses_of(100)).by_position[0]
    assert bucket.low == bucket.high == pytest.approx(bucket.loss)


def test_bootstrap_bounds_are_those_of_normal_theory_and_the_same_every_time():
    """Documents of equal length: the standard error of a mean of document means."""
    losses = losses_of(*[512] * 200)
    bucket = row_of(losses).by_position[0]
    means = np.array([loss.mean() for loss in losses])
    half = 1.96 * means.std() / math.sqrt(len(means))
    assert bucket.high - bucket.low == pytest.approx(2 * half, rel=0.1)
    assert row_of(losses) == row_of(losses)


def test_beginning_and_end_are_compared_over_the_same_long_documents():
    losses = losses_of(2000, 3001, 1999)
    row = row_of(losses, long_document=2000)
    assert row.loss_first_512 == pytest.approx(np.concatenate([loss[:512] for loss in losses[:2]]).mean())
    assert row.loss_last_quarter == pytest.approx(np.concatenate([losses[0][1500:], losses[1][2251:]]).mean())
    assert row.loss_last_quarter < row.loss_first_512  # these losses fall with position
    assert row_of(losses, long_document=4000).loss_first_512 is None


def test_the_row_is_made_of_plain_values():
    row = row_of(losses_of(600))
    assert row.to_dict() == asdict(row)
    assert {type(value) for value in row.to_dict()["by_position"][0].values()} == {int, float}

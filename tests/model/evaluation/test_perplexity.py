"""The row of evaluation.json, from known losses."""

import math
from dataclasses import asdict
from types import SimpleNamespace

import numpy as np
import pytest

from model.evaluation import Evaluation, summarize
from model.evaluation.perplexity import EDGES, TRAILING, summarize_sources
from tests.model.evaluation.documents import PROTOCOLS


def summarize_losses(losses, sizes, words=None, long_document=1024) -> Evaluation:
    documents = SimpleNamespace(bytes=sizes, words=words or [1] * len(losses))
    return summarize(losses, documents, PROTOCOLS["whole"], long_document=long_document)


def losses_of(*lengths: int) -> list[np.ndarray]:
    generator = np.random.default_rng(1)
    return [generator.gamma(2.0, size=n) * (1 + 500 / (500 + np.arange(n))) for n in lengths]


def row_of(losses, long_document=1024):
    return summarize_losses(losses, [4 * len(loss) for loss in losses], long_document=long_document)


def test_bits_per_byte_and_perplexity_are_plain_arithmetic():
    row = summarize_losses([np.array([1.0, 2.0]), np.array([3.0])], [5, 7], words=[1, 3])
    assert (row.nll_nats, row.tokens_scored, row.bytes, row.loss) == (6.0, 3, 12, 2.0)
    assert row.bits_per_byte == pytest.approx(6 / math.log(2) / 12)
    assert row.perplexity == pytest.approx(math.e**2)
    assert row.words == 4 and row.word_perplexity == pytest.approx(math.exp(6 / 4))


def test_documents_of_one_word_each_have_no_perplexity_per_word():
    """A genome of a million bases would have exp of a million nats."""
    row = summarize_losses([np.array([1.0, 2.0]), np.array([3.0])], [5, 7], words=[1, 1])
    assert (row.words, row.word_perplexity) == (2, None)


def test_tokens_without_text_have_losses_and_nothing_per_byte():
    losses = [np.array([1.0, 2.0]), np.array([3.0])]
    row = summarize_losses(losses, [0, 0], words=[0, 0])
    assert (row.loss, row.tokens_scored, row.bytes) == (2.0, 3, 0) and row.loss_low < 2.0 < row.loss_high
    assert (row.bits_per_byte, row.bits_per_byte_low, row.bits_per_byte_high, row.word_perplexity) == (None,) * 4
    of_web = summarize_sources(losses, SimpleNamespace(bytes=[0, 0]), ["web/a", "web/b"], ["web"])["web"]
    assert of_web["loss"] == 2.0 and of_web["bits_per_byte"] is None


def test_a_hopeless_loss_gives_a_finite_perplexity():
    assert math.isfinite(summarize_losses([np.array([1e6])], [1]).perplexity)


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


def test_one_document_has_no_bounds():
    row = row_of(losses_of(2100, 100))
    assert row.loss_low < row.loss < row.loss_high and row.by_position[0].low is not None
    assert (row.by_position[1].documents, row.by_position[1].low, row.by_position[1].high) == (1, None, None)
    alone = row_of(losses_of(2100))
    assert (alone.loss_low, alone.bits_per_byte_high, alone.trailing.low) == (None, None, None)
    assert alone.bits_per_byte == pytest.approx(alone.loss * 2100 / math.log(2) / alone.bytes)


def test_beginning_and_end_are_compared_over_the_same_long_documents():
    losses = losses_of(2000, 3001, 1999)
    row = row_of(losses, long_document=2000)
    assert row.loss_first_512 == pytest.approx(np.concatenate([loss[:512] for loss in losses[:2]]).mean())
    assert row.loss_last_quarter == pytest.approx(np.concatenate([losses[0][1500:], losses[1][2251:]]).mean())
    assert row.loss_last_quarter < row.loss_first_512  # these losses fall with position
    assert row_of(losses, long_document=4000).loss_first_512 is None


def test_the_row_is_made_of_plain_values():
    row = row_of(losses_of(600, 600))
    assert row.to_dict() == asdict(row)
    assert {type(value) for value in row.to_dict()["by_position"][0].values()} == {int, float}


def test_the_bounds_of_bits_per_byte_are_those_of_the_loss_in_another_unit():
    losses = losses_of(900, 300, 700)
    row = summarize_losses(losses, [4 * len(loss) for loss in losses])
    bits = [bound / math.log(2) / 4 for bound in (row.loss_low, row.loss, row.loss_high)]
    assert [row.bits_per_byte_low, row.bits_per_byte, row.bits_per_byte_high] == pytest.approx(bits)
    assert bits == sorted(bits)


def test_the_trailing_tokens_are_of_documents_that_have_so_many():
    losses = losses_of(2047, 2048, 5000)
    trailing = summarize_losses(losses, [1] * 3).trailing
    assert (trailing.documents, trailing.tokens) == (2, 2 * TRAILING) and TRAILING == 2048
    assert trailing.loss == pytest.approx(np.concatenate([losses[1], losses[2][5000 - 2048 :]]).mean(), rel=1e-12)
    assert summarize_losses(losses[:1], [1]).trailing is None


def test_a_bucket_says_how_many_documents_reach_it():
    assert [b.documents for b in row_of(losses_of(3000, 512, 513, 10)).by_position] == [4, 2, 1, 1]


def test_each_source_of_a_mixture_has_the_numbers_of_its_documents_alone():
    losses = losses_of(900, 40, 700, 1300)
    sizes = [4 * len(loss) for loss in losses]
    names = ["books/a", "code/books/b", "books/c", "code/d"]
    found = summarize_sources(losses, SimpleNamespace(bytes=sizes), names, ["code", "recall", "books"])
    assert list(found) == ["code", "books"], "a source that generates its sequences has no documents"
    for name, own in (("books", [0, 2]), ("code", [1, 3])):
        alone = asdict(summarize_losses([losses[each] for each in own], [sizes[each] for each in own]))
        assert found[name] == {key: pytest.approx(alone[key]) for key in found[name]}
        assert found[name]["documents"] == 2

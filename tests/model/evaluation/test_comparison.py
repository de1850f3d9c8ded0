"""Paired differences: sure where the runs differ alike on every document, however much documents differ."""

import math

import numpy as np
import pytest

from model.evaluation import compare


def losses(documents: int, seed: int = 0) -> list[np.ndarray]:
    generator = np.random.default_rng(seed)
    return [generator.gamma(2.0, size=50) * generator.uniform(0.2, 5) for _ in range(documents)]


def test_the_difference_is_that_of_the_totals():
    run, against = [np.array([1.0, 2.0]), np.array([5.0])], [np.array([2.0, 2.5]), np.array([4.0])]
    found = compare(run, against, [7, 5], same_tokens=True)
    assert found.loss == pytest.approx((8 - 8.5) / 3)
    assert found.bits_per_byte == pytest.approx(-0.5 / math.log(2) / 12)
    assert (found.documents, found.documents_better) == (2, 1)


def test_a_constant_gain_is_certain_though_documents_differ_widely():
    against = losses(30)
    run = [loss - 0.1 for loss in against]
    found = compare(run, against, [200] * 30, same_tokens=True)
    assert found.loss == pytest.approx(-0.1)
    assert found.loss_low == pytest.approx(-0.1) and found.loss_high == pytest.approx(-0.1)
    assert found.documents_better == 30


def test_the_bounds_are_those_of_normal_theory():
    generator = np.random.default_rng(3)
    against = losses(400)
    run = [loss + gain for loss, gain in zip(against, generator.normal(0.02, 0.3, 400), strict=True)]
    found = compare(run, against, [200] * 400, same_tokens=True)
    means = np.array([(a - b).mean() for a, b in zip(run, against, strict=True)])
    half = 1.96 * means.std() / math.sqrt(400)
    assert found.loss_high - found.loss_low == pytest.approx(2 * half, rel=0.1)
    assert found.loss_low < found.loss < found.loss_high


def test_other_tokenizers_are_compared_by_bytes_alone():
    run, against = [np.full(10, 1.0)], [np.full(4, 2.0)]
    found = compare(run, against, [20], same_tokens=False)
    assert found.loss is None and found.loss_low is None
    assert found.bits_per_byte == pytest.approx((10 - 8) / math.log(2) / 20)
    assert found.bits_per_byte_low is None and found.bits_per_byte_high is None, "one document bounds no difference"
    with pytest.raises(AssertionError, match="different tokens"):
        compare(run, against, [20], same_tokens=True)


def test_tokens_without_text_are_compared_by_token_alone():
    found = compare([np.full(4, 1.0)], [np.full(4, 2.0)], [0], same_tokens=True)
    assert found.loss == pytest.approx(-1.0)
    assert (found.bits_per_byte, found.bits_per_byte_low, found.bits_per_byte_high) == (None, None, None)

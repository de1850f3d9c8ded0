"""The intervals over documents contain the truth as often as they claim, also with few documents of unequal size."""

import numpy as np
import pytest
from scipy import stats

from model.evaluation.statistics import document_bounds


def test_documents_of_one_size_have_students_interval():
    sizes, gains = np.full(12, 500), np.random.default_rng(1).normal(0.01, 0.02, 12)
    half = stats.t.ppf(0.975, 11) * gains.std(ddof=1) / np.sqrt(12)
    assert document_bounds(gains * sizes, sizes) == pytest.approx((gains.mean() - half, gains.mean() + half))


def test_order_and_empty_documents_change_nothing():
    generator = np.random.default_rng(2)
    sizes, nats = generator.integers(100, 9000, 9), generator.normal(size=9)
    order = generator.permutation(9)
    bounds = document_bounds(nats, sizes)
    assert document_bounds(nats[order], sizes[order]) == pytest.approx(bounds)
    assert document_bounds(np.append(nats, 0.0), np.append(sizes, 0)) == pytest.approx(bounds)


@pytest.mark.parametrize("count", [2, 5, 10, 30])
@pytest.mark.parametrize("spread", [0.0, 0.6, 1.5], ids=lambda spread: f"sizes vary by e^{spread}")
def test_a_95_percent_interval_contains_the_truth_in_95_percent_of_samples(count, spread):
    """A percentile bootstrap contains it in half of the samples of two documents, and in 87 to 90 % of ten."""
    generator = np.random.default_rng(3)
    inside = 0
    for _ in range(2000):
        sizes = np.exp(generator.normal(10, spread, count))
        low, high = document_bounds(sizes * generator.normal(0.3, 1, count), sizes)
        inside += low <= 0.3 <= high
    assert 0.93 < inside / 2000 < 0.99


def test_one_document_that_holds_most_of_the_text_leaves_the_mean_open():
    """Sixty short documents add almost nothing to what one long document shows."""
    sizes = np.array([30_000, *[10] * 60])
    low, high = document_bounds(sizes * np.array([2.0, *[6.0] * 60]), sizes)
    assert low < 2 and high > 6


def test_one_document_has_no_bounds():
    assert document_bounds(np.array([1.0]), np.array([5])) == (None, None)

"""Confidence intervals over documents, since the tokens of one document are not independent, and of shares."""

import numpy as np

RESAMPLES = 1000
LEVELS = (0.025, 0.975)
COUNTS_AT_ONCE = 1 << 22


Bounds = tuple[float, float] | tuple[None, None]


def bootstrap(nats: np.ndarray, sizes: np.ndarray) -> Bounds:
    """Returns 95 % bounds of `nats.sum() / sizes.sum()` (Efron's percentile bootstrap over documents, seeded).

    nats, sizes: `[documents]`, the terms of either sum. Documents of size 0 do not count. The bounds are None if there
    is one document: it does not show how documents differ.
    """
    nats, sizes = nats[sizes > 0], sizes[sizes > 0]
    if len(nats) < 2:
        return None, None
    generator = np.random.default_rng(0)
    documents = len(nats)
    at_once = max(1, COUNTS_AT_ONCE // documents)
    means = []
    for first in range(0, RESAMPLES, at_once):
        drawn = generator.integers(documents, size=(min(at_once, RESAMPLES - first), documents))
        means.append(nats[drawn].sum(1) / sizes[drawn].sum(1))
    low, high = np.quantile(np.concatenate(means), LEVELS)
    return float(low), float(high)


def share_bounds(hits: int, count: int) -> tuple[float, float]:
    """Returns 95 % bounds of a share of `count` independent trials (Wilson 1927)."""
    from scipy.stats import binomtest

    interval = binomtest(hits, count).proportion_ci(confidence_level=LEVELS[1] - LEVELS[0], method="wilson")
    return float(interval.low), float(interval.high)


def mean_and_bounds(losses: list[np.ndarray]) -> tuple[float, float | None, float | None]:
    """Returns (mean, low, high) over all values of `losses`, one array per document."""
    nats, sizes = np.array([loss.sum() for loss in losses]), np.array([len(loss) for loss in losses])
    return (float(nats.sum() / sizes.sum()), *bootstrap(nats, sizes))

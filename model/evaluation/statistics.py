"""Confidence intervals over documents, since the tokens of one document are not independent, and of shares."""

import math

import numpy as np

CONFIDENCE = 0.95

Bounds = tuple[float, float] | tuple[None, None]


def document_bounds(nats: np.ndarray, sizes: np.ndarray) -> Bounds:
    """Returns 95 % bounds of `nats.sum() / sizes.sum()`, for documents drawn from a population of documents.

    The standard error is the jackknife's (Tukey 1958), which leaves out each document once, times the quantile of
    `document_quantile`: few documents, or few long ones that hold most of the text, give wide bounds. A percentile
    bootstrap is too narrow there: its 95 % intervals contained the truth in 87 % of samples of ten novels, and in 90 %
    of samples of 28 packages of code.

    nats, sizes: `[documents]`, the terms of either sum. Documents of size 0 do not count. The bounds are None if there
    is one document: it does not show how documents differ.
    """
    nats, sizes = nats[sizes > 0].astype(float), sizes[sizes > 0].astype(float)
    count = len(nats)
    if count < 2:
        return None, None
    mean = nats.sum() / sizes.sum()
    left_out = (nats.sum() - nats) / (sizes.sum() - sizes)
    error = math.sqrt((count - 1) / count * ((left_out - left_out.mean()) ** 2).sum())
    half = document_quantile(sizes) * error
    return float(mean - half), float(mean + half)


def document_quantile(sizes: np.ndarray) -> float:
    """Returns the quantile of Student's t for a mean over documents of these sizes, with one degree of freedom fewer
    than there are effective documents, (sum of sizes)^2 / sum of squared sizes (Kish 1965)."""
    from scipy.special import stdtrit

    sizes = sizes.astype(float)
    effective = sizes.sum() ** 2 / (sizes**2).sum()
    return float(stdtrit(max(1.0, effective - 1), (1 + CONFIDENCE) / 2))


def share_bounds(hits: int, count: int) -> tuple[float, float]:
    """Returns 95 % bounds of a share of `count` independent trials (Wilson 1927)."""
    from scipy.stats import binomtest

    interval = binomtest(hits, count).proportion_ci(confidence_level=CONFIDENCE, method="wilson")
    return float(interval.low), float(interval.high)


def mean_and_bounds(losses: list[np.ndarray]) -> tuple[float, float | None, float | None]:
    """Returns (mean, low, high) over all values of `losses`, one array per document."""
    nats, sizes = np.array([loss.sum() for loss in losses]), np.array([len(loss) for loss in losses])
    return (float(nats.sum() / sizes.sum()), *document_bounds(nats, sizes))

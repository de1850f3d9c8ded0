"""The loss as a function of training compute: a power law, and its uncertainty over documents and seeds.

    loss(C) = E + A C^-alpha     C in training FLOPs; E is the loss that no compute removes

The fit has one point per budget: the lowest loss over the sizes of the model, as in approach 2 of Hoffmann et al. 2022
(arXiv:2203.15556). They take the minimum of a parabola through many sizes; with few sizes we take the best size. A fit
of the whole L(N, D) has five parameters, which the budgets and few sizes of such a sweep do not determine. With fewer
than FREE_OFFSET budgets E is 0, which is the line in log-log axes of Kaplan et al. 2020 (arXiv:2001.08361): three
parameters pass through three points exactly, and would extrapolate their noise.
"""

import math
from dataclasses import dataclass

import numpy as np
from scipy.special import ndtr

from model.evaluation.statistics import document_quantile

RESAMPLES = 1000

FREE_OFFSET = 4
"""Smallest number of budgets with which E is fitted."""

LEAST_BUDGETS = 2
"""Smallest number of budgets that determine a law."""

EXPONENTS = np.geomspace(0.002, 4.0, 1500)
"""The exponents that a fit with an offset tries; neighbours differ by 0.5 %."""


@dataclass(frozen=True)
class PowerLaw:
    """Laws of several resamples at once: each parameter is an array `[resamples]`."""

    offset: np.ndarray  # E
    log_scale: np.ndarray  # log A
    exponent: np.ndarray  # alpha

    def loss(self, flops: float) -> np.ndarray:
        """Returns `[resamples]`."""
        return self.offset + np.exp(self.log_scale - self.exponent * np.log(flops))

    def flops(self, loss: np.ndarray) -> np.ndarray:
        """Returns the compute that reaches each loss `[resamples]`; infinite where it is not above E, or where the law
        does not fall."""
        above = loss - self.offset
        reaches = (above > 0) & (self.exponent > 0)
        with np.errstate(all="ignore"):
            log_flops = (self.log_scale - np.log(np.where(reaches, above, 1.0))) / self.exponent
            return np.where(reaches, np.exp(log_flops), np.inf)


def fit_power_law(flops: np.ndarray, losses: np.ndarray) -> PowerLaw:
    """Fits a law to each row of losses.

    Args:
        flops: `[budgets]`, at least LEAST_BUDGETS.
        losses: `[resamples, budgets]`, positive.

    Returns:
        With an offset, the least squares of the loss under E >= 0: for each of EXPONENTS the best E and A are linear.
        Without one, the least squares of the logarithm of the loss.
    """
    if len(flops) < FREE_OFFSET:
        slope, level = np.polyfit(np.log(flops), np.log(losses).T, 1)
        return PowerLaw(np.zeros_like(level), level, -slope)
    center = np.log(flops).mean()
    best = np.full(len(losses), np.inf)
    found = np.zeros((3, len(losses)))
    mean = losses.mean(1)
    for exponent in EXPONENTS:
        power = np.exp(-exponent * (np.log(flops) - center))
        spread = power - power.mean()
        scale = losses @ spread / (spread @ spread)
        offset = mean - scale * power.mean()
        through_zero = losses @ power / (power @ power)
        scale = np.where(offset < 0, through_zero, scale)
        offset = np.maximum(offset, 0.0)
        # A loss that rises with compute has no falling law: a constant is then the nearest one.
        rises = scale <= 0
        offset, scale = np.where(rises, mean, offset), np.where(rises, 0.0, scale)
        error = ((losses - offset[:, None] - scale[:, None] * power) ** 2).sum(1)
        better = error < best
        best = np.where(better, error, best)
        with np.errstate(divide="ignore"):
            log_scale = np.log(scale) + exponent * center
        found = np.where(better, np.stack([offset, log_scale, np.where(rises, 0.0, exponent)]), found)
    return PowerLaw(*found)


@dataclass(frozen=True)
class Interval:
    """A number, and the bounds of its 95 % interval; None without losses of several documents."""

    value: float
    low: float | None
    high: float | None

    @staticmethod
    def of(resamples: np.ndarray, levels: tuple[float, float]) -> "Interval":
        """The first resample is all documents and seeds, once each; the others are drawn.

        levels: of the quantiles that are the bounds (`Resampling.levels`).
        """
        if len(resamples) == 1:
            return Interval(float(resamples[0]), None, None)
        low, high = np.quantile(resamples[1:], levels, method="inverted_cdf")  # interpolates no infinity
        return Interval(float(resamples[0]), float(low), float(high))


class Resampling:
    """The quality of runs under resamples of documents and seeds (Efron's bootstrap, seeded).

    All runs have the same drawn documents, so that what they share cancels in differences. Each mean over seeds draws
    its own seeds: the noise of two trainings is independent. Resamples of few documents or seeds vary too little. So
    `levels` are wider than 2.5 % and 97.5 % where there are few documents (the expanded percentiles of Hesterberg 2015,
    arXiv:1411.5279), and the deviations of drawn seeds from their mean are sqrt(seeds / (seeds - 1)) times as large.
    """

    def __init__(self, sizes: np.ndarray, unit: float, resamples: int = RESAMPLES):
        """sizes: `[documents]`, bytes or tokens. unit: nats of a unit of the quality: ln 2 for bits per byte."""
        self.sizes, self.unit, self.resamples = sizes, unit, resamples
        self.generator = np.random.default_rng(0)
        documents = len(sizes)
        counts = self.generator.multinomial(documents, np.full(documents, 1 / documents), resamples)
        self.counts = np.concatenate([np.ones((1, documents)), counts])
        self.drawn_sizes = self.counts @ sizes
        outside = float(ndtr(-document_quantile(sizes) * math.sqrt(documents / (documents - 1))))
        self.levels = outside, 1 - outside

    def quality(self, nats: np.ndarray) -> np.ndarray:
        """Returns `[1 + resamples]`, of which the first is of all documents and seeds.

        nats: `[seeds, documents]` of the runs of one setting.
        """
        found, seeds = self.on_documents(nats), len(nats)
        mean = found.mean(1)
        drawn = self.generator.integers(seeds, size=(self.resamples, seeds))
        drawn = np.concatenate([np.arange(seeds)[None], drawn])
        deviation = np.take_along_axis(found, drawn, 1).mean(1) - mean
        return mean + deviation * math.sqrt(seeds / max(1, seeds - 1))

    def on_documents(self, nats: np.ndarray) -> np.ndarray:
        """Returns the quality of each seed on the documents of each resample, `[1 + resamples, seeds]`."""
        return (self.counts @ nats.T) / self.drawn_sizes[:, None] / self.unit

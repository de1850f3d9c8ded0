"""Forecasts of the series of data=timeseries, as a composed `series` group describes: their errors, beside a baseline.

The protocol is that of Informer (Zhou et al. 2021) and PatchTST (Nie et al. 2023): values are standardised by the mean
and the deviation of each series' training part, a forecast starts at a row of the split and ends within it, and may
read all rows before. The errors are means over all series, forecasts and values ahead. Each series is forecast from
its own past alone.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from configs.errors import ConfigError, refused
from configs.mixture import build_source
from configs.runs import Run
from data.baselines import seasonal_naive
from data.sources import BadDocuments, TimeSeries
from data.sources.time_series import Series
from data.tokenizers import Bins
from model.decoding.sampling import Sampling
from model.evaluation.continuations import sample_continuations
from model.evaluation.scorer import ProgressBar
from model.precision import autocast

log = logging.getLogger(__name__)

HORIZONS = (96, 192, 336, 720)
PREFILL = 512  # tokens of a context that are read at once

Forecast = tuple[int, slice]
"""The index of a series, and the rows that are forecast."""


def open_series(run: Run, data: Mapping[str, Any] | None) -> list[Series]:
    """Returns the series of a composed `data` group, or of the run's own; none of other sources than TimeSeries."""
    if data:
        source, path, policy = build_source(data), data["path"], data["on_bad_document"]
    else:
        source, path, policy = run.data.source, run.data.path, run.data.on_bad_document
    return list(source.read(path, BadDocuments(policy, path))) if isinstance(source, TimeSeries) else []


@dataclass(frozen=True)
class ForecastPlan:
    """What is forecast of a list of series.

    horizons: values ahead, shortest first. context: values that are read before each forecast.
    """

    horizons: list[int]
    context: int
    forecasts: list[Forecast]


def plan_forecasts(run: Run, series: Sequence[Series], split: str, settings: Mapping[str, Any]) -> ForecastPlan | None:
    """Returns the plan of the forecasts that the composed group `settings` describes. Returns None, with a warning, if
    `settings` has no horizons and none of HORIZONS fits the training sequences and the split.

    Raises:
        ConfigError: the context or a horizon does not fit the run, or the split of a series.
    """
    horizons = settings["horizons"] or _default_horizons(run, series, split, settings)
    if not horizons:
        log.warning(
            f"no forecasts: none of {', '.join(map(str, HORIZONS))} values ahead is at most half a training sequence"
            f" ({run.sequence_length} values) and fits the {split} split; series.horizons=[24] forecasts 24 values"
        )
        return None
    horizons = sorted(set(horizons))
    context = _context(horizons, settings, run)
    return ForecastPlan(horizons, context, _forecasts(series, split, horizons, context, settings["stride"]))


def measure_forecasts(
    run: Run, series: Sequence[Series], plan: ForecastPlan, config: Mapping[str, Any], progress_bar: ProgressBar
) -> dict[str, Any]:
    """Returns `series_forecasts` of a row of evaluation.json, with the errors of the forecasts by horizon.

    Errors named `quantized_` are those of the right values after rounding to the centers of their bins: the part of a
    model's errors that is due to the bins alone.

    Args:
        plan: of these series (`plan_forecasts`).
        config: the composed config of scripts/evaluate.py.
    """
    settings, bins = config["series"], run.tokenizer
    assert isinstance(bins, Bins)
    horizons, context, forecasts = plan.horizons, plan.context, plan.forecasts
    sampling = Sampling(temperature=1.0, top_k=None, top_p=1.0, seed=config["seed"])
    standardized = [each.standardize(each.values) for each in series]
    errors = {horizon: Errors() for horizon in horizons}
    total = settings["samples"] * sum(rows.stop - rows.start for _, rows in forecasts)
    with progress_bar(f"{run.label}, forecasts", total) as progress, autocast(run.model, run.precision):
        for length in sorted({rows.stop - rows.start for _, rows in forecasts}, reverse=True):
            chosen = [(index, rows) for index, rows in forecasts if rows.stop - rows.start == length]
            contexts = [
                bins.tokens_of(series[index].values[rows.start - context : rows.start] / series[index].scale)
                for index, rows in chosen
            ]
            sampled = sample_continuations(
                run.model,
                contexts,
                length,
                sampling=sampling,
                samples=settings["samples"],
                sequences_at_once=settings["sequences_at_once"],
                prefill_chunk=PREFILL,
                vocabulary=bins.bos,
                progress=progress,
            )
            for (index, rows), tokens in zip(chosen, sampled, strict=True):
                each, right = series[index], standardized[index]
                naive = seasonal_naive(right[: rows.start], length, settings["period"])
                quantized = each.standardize(
                    bins.numbers_of(bins.tokens_of(each.values[rows] / each.scale)) * each.scale
                )
                forecast = each.standardize(np.median(bins.numbers_of(tokens), axis=0) * each.scale)
                for horizon in horizons:
                    if horizon <= length:
                        found = {"": forecast, "seasonal_naive_": naive, "quantized_": quantized}
                        errors[horizon].add({name: (at - right[rows])[:horizon] for name, at in found.items()})
    return {
        "series": len(series),
        "context": context,
        **{key: settings[key] for key in ("stride", "samples", "period")},
        "point": "median",
        "seed": config["seed"],
        "horizons": [{"horizon": horizon, **errors[horizon].summary()} for horizon in horizons],
    }


class Errors:
    """The errors of several forecasts."""

    def __init__(self) -> None:
        self.forecasts = 0
        self.errors: dict[str, list[np.ndarray]] = {}

    def add(self, errors: Mapping[str, np.ndarray]) -> None:
        self.forecasts += 1
        for name, values in errors.items():
            self.errors.setdefault(name, []).append(values)

    def summary(self) -> dict[str, float]:
        """Returns the number of forecasts, and mean squared and mean absolute errors by name."""
        found: dict[str, float] = {"forecasts": self.forecasts}
        for name, values in self.errors.items():
            found[f"{name}mse"] = float(np.square(values).mean())
            found[f"{name}mae"] = float(np.abs(values).mean())
        return found


def _default_horizons(run: Run, series: Sequence[Series], split: str, settings: Mapping[str, Any]) -> list[int]:
    """Returns those of HORIZONS that are at most half a training sequence and for which the split has room."""
    horizons = [horizon for horizon in HORIZONS if horizon <= run.sequence_length // 2]
    while horizons and _room(series, split, _context_before(horizons[-1], settings, run)) < horizons[-1]:
        horizons.pop()
    return horizons


def _context_before(longest: int, settings: Mapping[str, Any], run: Run) -> int:
    """Returns the number of values before a forecast. `longest`: the longest horizon."""
    return run.sequence_length - longest if settings["context"] is None else settings["context"]


def _context(horizons: Sequence[int], settings: Mapping[str, Any], run: Run) -> int:
    """Returns the number of values before a forecast, checked."""
    longest, limit = horizons[-1], run.model.config.max_length
    context = _context_before(longest, settings, run)
    if context + longest > limit:
        accepted = f"at most {limit - longest}, which the longest horizon leaves of model.max_length={limit}"
        raise refused("series.context", context, accepted)
    if context < settings["period"]:
        accepted = (
            f"at least series.period={settings['period']} (and is {context}, since the longest horizon is {longest})"
        )
        raise refused("series.context", settings["context"], accepted)
    return context


def _room(series: Sequence[Series], split: str, context: int) -> int:
    """Returns the most rows of a series' split that come after `context` others."""
    return max(0, *(each.part(split).stop - max(each.part(split).start, context) for each in series))


def _forecasts(
    series: Sequence[Series], split: str, horizons: Sequence[int], context: int, stride: int
) -> list[Forecast]:
    """Returns all forecasts. The length of each is the longest horizon that ends within the split."""
    found: list[Forecast] = []
    for index, each in enumerate(series):
        part = each.part(split)
        starts = range(max(part.start, context), part.stop - horizons[0] + 1, stride)
        lengths = [max(horizon for horizon in horizons if start + horizon <= part.stop) for start in starts]
        found += [(index, slice(start, start + length)) for start, length in zip(starts, lengths, strict=True)]
    rows = _room(series, split, context)
    if rows < horizons[-1]:
        accepted = f"at most {rows}, the rows of the {split} split that come after {context} others"
        raise ConfigError(f"series.horizons={list(horizons)}: must be {accepted}")
    return found

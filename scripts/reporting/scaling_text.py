"""The scaling laws of a sweep in words, in a table, and as CSV."""

import csv
import io
from collections.abc import Sequence

import numpy as np

from data.units import short
from scripts.reporting.scaling import Fit, Scaling
from scripts.reporting.scaling_law import FREE_OFFSET, Interval
from scripts.reporting.table import signed, significant

NAMED = 6
"""Largest number of missing jobs that a report names; its lists of jobs have all of them."""

ENOUGH_STEPS = 50
"""Runs of fewer steps differ from their budget by over 1 %, since steps are whole."""

READING = (
    "Each point is the best size of a pattern at one budget of training FLOPs. The lines are the laws that the filled "
    "points give, with 95 % intervals over documents and seeds. The hollow points are the largest budget, which no law "
    "uses."
)


def heading(scaling: Scaling, count: int) -> str:
    """Returns the title of a sweep's table among `count` of them."""
    return "Scaling laws" + (f": {scaling.sweep}" if count > 1 else "")


def write_scaling_csv(scalings: Sequence[Scaling]) -> str:
    """Returns the points of all fits in full precision."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    losses = list(dict.fromkeys(scaling.quality for scaling in scalings))
    writer.writerow(("sweep", "pattern", "flops", "parameters", *losses, "held_out"))
    for scaling in scalings:
        for fit in scaling.fits:
            for point in filter(None, (*fit.points, fit.held_out)):
                own = [point.loss if scaling.quality == each else "" for each in losses]
                numbers = (point.flops, point.parameters, *own, point is fit.held_out)
                writer.writerow((scaling.sweep, fit.pattern, *numbers))
    return text.getvalue()


def header(scaling: Scaling) -> tuple[str, ...]:
    """Returns the titles of the columns of `table_of`."""
    unit = short(scaling.unit)
    losses = (f"E ({unit})", f"predicted ({unit})", "measured", "measured minus predicted")
    return "pattern", "exponent", *losses, "FLOPs of dense for the same loss"


def table_of(scaling: Scaling) -> list[tuple[str, ...]]:
    """Returns the rows of the table of laws."""
    return [
        (
            fit.pattern,
            _bounded(fit.exponent, "{:.4f}"),
            "0 (not fitted)" if fit.offset is None else _bounded(fit.offset, "{:.4f}"),
            _bounded(fit.predicted, "{:.4f}"),
            f"{fit.held_out.loss:.4f}" if fit.held_out else "missing",
            _difference(fit),
            "1 (baseline)" if fit.baseline else "" if fit.multiplier is None else _times(fit.multiplier),
        )
        for fit in scaling.fits
    ]


def sentences(scaling: Scaling) -> list[str]:
    """Returns the findings of a scaling sweep, most important first."""
    result = []
    for fit in scaling.fits:
        told = (
            f"{fit.pattern}, best of its sizes: the law of {len(fit.points)} budgets up to {fit.points[-1].flops:.3g} "
            f"FLOPs predicts {fit.predicted.value:.4f} {scaling.unit} at {scaling.held_out:.3g} FLOPs; "
        )
        if fit.held_out is None:
            told += "that budget is not measured yet"
        elif fit.difference.low is None:
            told += f"measured is {fit.held_out.loss:.4f}"
        else:
            told += (
                f"measured is {fit.held_out.loss:.4f}, {'inside' if fit.inside else 'outside'} the interval (measured "
                f"minus predicted {signed(fit.difference.value)}, 95 % interval {signed(fit.difference.low)} to "
                f"{signed(fit.difference.high)})"
            )
        result.append(f"{told}.")
    for fit in scaling.fits:
        if fit.multiplier is not None:
            wrong = any(each.inside is False for each in scaling.fits if each is fit or each.baseline)
            doubt = ", of which at least one misses the largest budget" if wrong else ""
            result.append(
                f"For the loss of {fit.pattern} at {fit.points[-1].flops:.3g} FLOPs, dense needs "
                f"{_times(fit.multiplier)} times as many FLOPs, by both laws{doubt}."
            )
    return result


def limits(scaling: Scaling) -> list[str]:
    """Returns what the fits do not show, and what they lack."""
    result = [f"No scaling law: {each}." for each in scaling.refused]
    if scaling.missing:
        more = f"; and {len(scaling.missing) - NAMED} more" if len(scaling.missing) > NAMED else ""
        result.append(
            f"The scaling laws lack the results of {'; '.join(scaling.missing[:NAMED])}{more}: another size may be "
            "better at their budgets."
        )
    if not scaling.fits:
        return result
    if scaling.fits[0].predicted.low is None:
        result.append("The scaling laws have no intervals: not every job has losses of several documents.")
    elif scaling.seeds < 2:
        result.append(
            "The intervals of the scaling laws do not contain the noise of training where a pattern and size ran with "
            "one seed."
        )
    if any(fit.offset is None for fit in scaling.fits):
        result.append(
            f"With fewer than {FREE_OFFSET} fitted budgets the law has no loss that compute cannot remove (E): it "
            "predicts too low a loss far beyond the fitted budgets."
        )
    if scaling.steps is not None and scaling.steps < ENOUGH_STEPS:
        result.append(
            f"The shortest run of the scaling laws has {scaling.steps:.0f} steps. Steps are whole, so its FLOPs "
            f"differ from its budget by up to {0.5 / scaling.steps:.0%}."
        )
    edges = [
        f"{fit.pattern} at {', '.join(f'{point.flops:.3g}' for point in points)} FLOPs"
        for fit in scaling.fits
        if (points := [p for p in (*fit.points, *filter(None, [fit.held_out])) if p.at_edge])
    ]
    if edges:
        result.append(
            f"The best size is the smallest or the largest one for {'; '.join(edges)}: another size may be "
            "better there, and the law of the best size another one."
        )
    return result


def _bounded(found: Interval, form: str) -> str:
    text = form.format(found.value)
    return text if found.low is None else f"{text} ({form.format(found.low)} to {form.format(found.high)})"


def _difference(fit: Fit) -> str:
    if fit.difference is None:
        return ""
    low, high = fit.difference.low, fit.difference.high
    bounds = "" if low is None else f" ({signed(low)} to {signed(high)}): {'inside' if fit.inside else 'outside'}"
    return signed(fit.difference.value) + bounds


def _times(found: Interval) -> str:
    """Returns the multiplier; a loss that dense never reaches by its law has no finite one."""

    def one(value: float) -> str:
        return "infinitely many" if np.isinf(value) else significant(value)

    return one(found.value) + ("" if found.low is None else f" ({one(found.low)} to {one(found.high)})")

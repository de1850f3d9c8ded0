"""The table behind the figures: pareto.csv in full precision and plain units, and its readable form for the pages.

A column of the readable form has one unit, chosen by its largest number, so that its cells can be compared at a glance.
"""

import csv
import io
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from scripts.reporting.aggregate import COSTS, MEASURED, QUALITY, Estimate, Row
from scripts.reporting.jobs import STATES

MINUS = "\N{MINUS SIGN}"
SHORT = {"step_seconds": "time", "attention_flops_per_token": "FLOPs", "peak_memory_bytes": "memory"}
"""A cost in one word, where there is room for no more."""

CSV_COLUMNS = (
    *("sweep", "label", "baseline", "seeds", "jobs"),
    *(f"jobs_{state.replace(' ', '_')}" for state in STATES),
    *(f"{name}{end}" for name in MEASURED for end in ("", "_low", "_high")),
    *("difference_from_baseline", "difference_low", "difference_high"),
    *(f"{cost}_over_baseline" for cost in COSTS),
    *(f"front_{cost}" for cost in COSTS),
    "commands",
)
"""Of pareto.csv: a row a pattern; `_low` and `_high` are 95 % bounds over seeds, empty where there is one seed."""

UNITS: dict[str, tuple[tuple[float, str], ...]] = {
    "seconds": ((1.0, "s"), (1e-3, "ms")),
    "flops": ((1e12, "TFLOP"), (1e9, "GFLOP"), (1e6, "MFLOP"), (1e3, "kFLOP"), (1, "FLOP")),
    "bytes": ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1, "B")),
    "tokens": ((1e9, "billions"), (1e6, "millions"), (1e3, "thousands"), (1, "")),
}
"""What a kind of number is told in, largest first: the first whose size the column's largest number reaches."""


@dataclass(frozen=True)
class Cell:
    """One cell: what is read, and what it is sorted by (None: nothing there, last in either direction)."""

    text: str
    order: float | str | None


@dataclass(frozen=True)
class Column:
    """One column of the readable table."""

    title: str
    hint: str
    cells: tuple[Cell, ...]
    numeric: bool = True


def make_columns(rows: Sequence[Row]) -> list[Column]:
    """The readable table of `rows`; columns without any number are left out."""
    several_seeds = any(len(row.counted) > 1 for row in rows)
    quality = "held out; lower is better" + ("; ± 95 % over seeds" if several_seeds else "")
    found = [
        Column("pattern", "what a query sees", tuple(Cell(row.label, row.label) for row in rows), numeric=False),
        _estimates(rows, QUALITY, "bits/byte", quality, _fixed(4)),
        Column("vs dense", "bits per byte more or fewer than dense; ± 95 %", tuple(map(_difference, rows))),
        _in_units(rows, "step_seconds", "step time", "median of an optimizer step", "seconds"),
        _ratios(rows, "step_seconds", "time/dense", "step time over dense's"),
        _in_units(rows, COSTS[1], "attention a token", "attention FLOPs a token, training, from the layouts", "flops"),
        _ratios(rows, COSTS[1], "FLOPs/dense", "attention FLOPs over dense's"),
        _in_units(rows, "peak_memory_bytes", "memory", "most that was held while training", "bytes"),
        Column("front", "no other is better in quality and in this cost", tuple(_fronts(row) for row in rows), False),
        Column("jobs", "what became of them", tuple(_state(row) for row in rows), numeric=False),
        _estimates(rows, "tokens_per_second", "tokens/s", "while training", lambda value: f"{value:,.0f}"),
        _estimates(rows, "density_pairs", "pairs seen", "of dense causal attention's", lambda value: f"{value:.1%}"),
        _estimates(rows, "density_tiles", "tiles computed", "of dense's", lambda value: f"{value:.1%}"),
        _in_units(rows, "train_tokens", "trained on", "tokens", "tokens"),
        _estimates(rows, "train_seconds", "train time (s)", "with its evaluations", lambda value: f"{value:,.0f}"),
    ]
    return [column for column in found if any(cell.order is not None for cell in column.cells)]


def unit_of(kind: str, largest: float) -> tuple[float, str]:
    """(size, name) of the unit for numbers up to `largest`."""
    return next((unit for unit in UNITS[kind] if abs(largest) >= unit[0]), UNITS[kind][-1])


def significant(value: float, digits: int = 3) -> str:
    """`value` to so many digits, never with an exponent: 0.0123, 1.23, 123, 12,300."""
    if not value:
        return "0"
    rounded = float(f"{value:.{digits}g}")
    places = max(0, digits - 1 - int(f"{rounded:e}".partition("e")[2]))
    return f"{rounded:,.{places}f}"


def signed(value: float, places: int = 4) -> str:
    """With its sign; a true minus is as wide as a plus. What rounds to nothing has none."""
    text = f"{value:+.{places}f}"
    return text.lstrip("+-") if not float(text) else text.replace("-", MINUS)


def write_csv(rows: Sequence[Row]) -> str:
    """pareto.csv."""
    text = io.StringIO()
    writer = csv.DictWriter(text, CSV_COLUMNS, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        states = Counter(job.state for job in row.jobs)
        line = {
            "sweep": row.sweep,
            "label": row.label,
            "baseline": row.baseline,
            "seeds": " ".join(str(job.seed) for job in row.counted),
            "jobs": len(row.jobs),
            "commands": "\n".join(job.command for job in row.jobs),
        }
        line |= {f"jobs_{state.replace(' ', '_')}": states[state] for state in STATES}
        line |= {f"front_{cost}": cost in row.fronts for cost in COSTS}
        line |= {f"{cost}_over_baseline": ratio for cost, ratio in row.ratios.items()}
        for name, found in (*row.values.items(), ("difference", row.difference)):
            if found is not None:
                mean = "difference_from_baseline" if name == "difference" else name
                line |= {mean: found.mean, f"{name}_low": found.low, f"{name}_high": found.high}
        writer.writerow(line)
    return text.getvalue()


def _state(row: Row) -> Cell:
    """One word where all seeds agree; a done job that could not be judged is no done one."""
    states = Counter(job.state if job.counted or job.state != "done" else "not judged" for job in row.jobs)
    total = len(row.jobs)
    parts = [f"{count} {state}" if len(states) > 1 or total > 1 else state for state, count in states.items()]
    return Cell(", ".join(sorted(parts, key=lambda part: "done" not in part)), ", ".join(sorted(states)))


def _difference(row: Row) -> Cell:
    if row.difference is None:
        return Cell("baseline", 0.0) if row.baseline and QUALITY in row.values else Cell("", None)
    return Cell(_with_bounds(row.difference, signed, _fixed(4)), row.difference.mean)


def _fronts(row: Row) -> Cell:
    names = [SHORT[cost] for cost in COSTS if cost in row.fronts]
    return Cell(", ".join(names), len(names) or None)


def _fixed(places: int) -> Callable[[float], str]:
    return lambda value: f"{value:.{places}f}"


def _estimates(rows: Sequence[Row], name: str, title: str, hint: str, form: Callable[[float], str]) -> Column:
    cells = []
    for row in rows:
        found = row.values.get(name)
        bounds = found is not None and name == QUALITY
        text = "" if found is None else _with_bounds(found, form, form) if bounds else form(found.mean)
        cells.append(Cell(text, None if found is None else found.mean))
    return Column(title, hint, tuple(cells))


def _in_units(rows: Sequence[Row], name: str, title: str, hint: str, kind: str) -> Column:
    size, unit = unit_of(kind, max((row.values[name].mean for row in rows if name in row.values), default=0.0))
    title = f"{title} ({unit})" if unit else title
    return _estimates(rows, name, title, hint, lambda value: significant(value / size))


def _ratios(rows: Sequence[Row], cost: str, title: str, hint: str) -> Column:
    def cell(row: Row) -> Cell:
        ratio = 1.0 if row.baseline and cost in row.values else row.ratios.get(cost)
        return Cell("" if ratio is None else f"{ratio:.2f}", ratio)

    return Column(title, hint, tuple(cell(row) for row in rows))


def _with_bounds(found: Estimate, form: Callable[[float], str], width: Callable[[float], str]) -> str:
    half = found.half_width
    return form(found.mean) + (f" ± {width(half)}" if half is not None else "")

"""The table of rows: pareto.csv in full precision and base units, and a readable table for the pages.

A column of the readable table has one unit, chosen for its largest number.
"""

import csv
import io
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from data.units import BITS, LOSS, OF_TEXT, short
from scripts.reporting.aggregate import COSTS, MEASURED, Estimate, Paired, Row, unit_in, unit_of_quality
from scripts.reporting.contexts import recall_length, recall_of
from scripts.reporting.jobs import STATES

MINUS = "\N{MINUS SIGN}"
SHORT = {"step_seconds": "time", "attention_flops_per_token": "FLOPs", "peak_memory_bytes": "memory"}
"""{cost: its name in one word}."""

CSV_COLUMNS = (
    *("sweep", "label", "baseline", "seeds", "jobs"),
    *(f"jobs_{state.replace(' ', '_')}" for state in STATES),
    *(f"{name}{end}" for name in MEASURED for end in ("", "_low", "_high")),
    *("difference_from_baseline", "difference_low", "difference_high"),
    *("difference_low_over_documents", "difference_high_over_documents"),
    *("difference_from_control", "control_low", "control_high"),
    *(f"{cost}_over_baseline" for cost in COSTS),
    *(f"front_{cost}" for cost in COSTS),
    "commands",
)
"""Columns of pareto.csv. `_low` and `_high` are 95 % bounds over seeds, empty for one seed; those of the difference
to the control are over documents."""

OF_DIFFERENCES = "over the seeds of both; ± 95 % over seeds, in brackets 95 % over documents"

UNITS: dict[str, tuple[tuple[float, str], ...]] = {
    "seconds": ((1.0, "s"), (1e-3, "ms")),
    "flops": ((1e15, "PFLOP"), (1e12, "TFLOP"), (1e9, "GFLOP"), (1e6, "MFLOP"), (1e3, "kFLOP"), (1, "FLOP")),
    "bytes": ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1, "B")),
    "tokens": ((1e9, "billions"), (1e6, "millions"), (1e3, "thousands"), (1, "")),
}
"""{kind of number: (size, unit), largest first}. A column has the first unit that its largest number reaches."""


@dataclass(frozen=True)
class Cell:
    """A cell: its text, and the value by which it is sorted (None: empty, last in both directions)."""

    text: str
    order: float | str | None


@dataclass(frozen=True)
class Column:
    """A column of the readable table."""

    title: str
    hint: str
    cells: tuple[Cell, ...]
    numeric: bool = True


def make_columns(rows: Sequence[Row]) -> list[Column]:
    """Returns the readable table of `rows`, without empty columns."""
    several_seeds = any(len(row.counted) > 1 for row in rows)
    unit, bits = unit_of_quality(rows), unit_in(rows, BITS)
    loss = unit_in([row for row in rows if LOSS in row.values], LOSS)
    quality = "held out; lower is better" + ("; ± 95 % over seeds" if several_seeds else "")
    found = [
        Column(
            "pattern",
            "attention pattern and settings",
            tuple(Cell(row.label, row.label) for row in rows),
            numeric=False,
        ),
        _estimates(rows, BITS, short(bits), quality, _fixed(4)),
        _estimates(rows, LOSS, short(loss), "of tokens without text; " * (loss == OF_TEXT[LOSS]) + quality, _fixed(4)),
        Column(
            "vs dense",
            f"difference of {unit} to dense, {OF_DIFFERENCES}",
            tuple(_difference(row, row.difference, row.difference_paired, "baseline" * row.baseline) for row in rows),
        ),
        Column(
            "vs control",
            f"difference of {unit} to the control, {OF_DIFFERENCES}",
            tuple(
                _difference(row, row.over_control, row.over_control_paired, "control" * row.is_control) for row in rows
            ),
        ),
        _in_units(rows, "step_seconds", "step time", "median of an optimizer step", "seconds"),
        _ratios(rows, "step_seconds", "time/dense", "step time divided by dense's"),
        _in_units(
            rows, COSTS[1], "attention per token", "attention FLOPs per training token, counted on the layouts", "flops"
        ),
        _ratios(rows, COSTS[1], "FLOPs/dense", "attention FLOPs divided by dense's"),
        _in_units(rows, "peak_memory_bytes", "memory", "peak memory of training", "bytes"),
        Column(
            "front",
            "Pareto fronts: no other pattern is better in both quality and this cost",
            tuple(_fronts(row) for row in rows),
            False,
        ),
        Column("jobs", "states of the jobs", tuple(_state(row) for row in rows), numeric=False),
        _estimates(rows, "tokens_per_second", "tokens/s", "in training", lambda value: f"{value:,.0f}"),
        _estimates(
            rows, "density_pairs", "visible pairs", "fraction of dense causal attention", lambda value: f"{value:.1%}"
        ),
        _estimates(
            rows, "density_tiles", "computed tiles", "fraction of dense causal attention", lambda value: f"{value:.1%}"
        ),
        _in_units(rows, "train_tokens", "trained on", "tokens", "tokens"),
        _estimates(
            rows, "train_seconds", "train time (s)", "with evaluations during training", lambda value: f"{value:,.0f}"
        ),
        _in_units(rows, "cache_bytes", "cache", "of one sequence as long as those of the training", "bytes"),
        _estimates(
            rows,
            "decode_ms_per_token",
            "ms/token",
            "to decode a token behind such a sequence",
            lambda value: f"{value:.2f}",
        ),
        *_recall(rows),
        _in_units(rows, "total_tokens", "both stages", "tokens of the first stage and this one", "tokens"),
        _estimates(
            rows,
            "total_seconds",
            "both stages (s)",
            "training time of the first stage and this one",
            lambda value: f"{value:,.0f}",
        ),
        _in_units(rows, "total_flops", "both stages", "training FLOPs of the first stage and this one", "flops"),
    ]
    return [column for column in found if any(cell.order is not None for cell in column.cells)]


def unit_of(kind: str, largest: float) -> tuple[float, str]:
    """Returns (size, name) of the unit for numbers up to `largest`."""
    return next((unit for unit in UNITS[kind] if abs(largest) >= unit[0]), UNITS[kind][-1])


def significant(value: float) -> str:
    """Returns `value` with three significant digits and no exponent: 0.0123, 1.23, 123, 12,300."""
    if not value:
        return "0"
    rounded = float(f"{value:.3g}")
    places = max(0, 2 - int(f"{rounded:e}".partition("e")[2]))
    return f"{rounded:,.{places}f}"


def signed(value: float) -> str:
    """Returns `value` with its sign and four decimals; a minus is as wide as a plus, and a rounded zero has no sign."""
    text = f"{value:+.4f}"
    return text.lstrip("+-") if not float(text) else text.replace("-", MINUS)


def write_csv(rows: Sequence[Row]) -> str:
    """Returns the content of pareto.csv."""
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
        if row.over_control is not None:
            bounds = row.over_control_paired or row.over_control
            line |= {"difference_from_control": bounds.mean, "control_low": bounds.low, "control_high": bounds.high}
        if row.difference_paired is not None:
            bounds = row.difference_paired.low, row.difference_paired.high
            line |= dict(zip(("difference_low_over_documents", "difference_high_over_documents"), bounds, strict=True))
        for name, found in (*row.values.items(), ("difference", row.difference)):
            if found is not None:
                mean = "difference_from_baseline" if name == "difference" else name
                line |= {mean: found.mean, f"{name}_low": found.low, f"{name}_high": found.high}
        writer.writerow(line)
    return text.getvalue()


def _state(row: Row) -> Cell:
    """Counts the states of a row's jobs. Done jobs without an evaluation count as "not evaluated"."""
    states = Counter(job.state if job.counted or job.state != "done" else "not evaluated" for job in row.jobs)
    total = len(row.jobs)
    parts = [f"{count} {state}" if len(states) > 1 or total > 1 else state for state, count in states.items()]
    return Cell(", ".join(sorted(parts, key=lambda part: "done" not in part)), ", ".join(sorted(states)))


def _difference(row: Row, over_seeds: Estimate | None, over_documents: Paired | None, name: str) -> Cell:
    """The difference to a row, with its intervals over seeds and over documents; `name` in the cell of that row."""
    found = over_seeds or over_documents
    if found is None:
        return Cell(name, 0.0) if name and row.quality in row.values else Cell("", None)
    text = signed(found.mean) if over_seeds is None else _with_bounds(over_seeds, signed, _fixed(4))
    if over_documents is not None and over_documents.low is not None:
        text += f" ({signed(over_documents.low)} to {signed(over_documents.high)})"
    return Cell(text, found.mean)


def _fronts(row: Row) -> Cell:
    names = [SHORT[cost] for cost in COSTS if cost in row.fronts]
    return Cell(", ".join(names), len(names) or None)


def _recall(rows: Sequence[Row]) -> list[Column]:
    """A column for each task of the recall suite."""
    length = recall_length(rows)
    if length is None:
        return []
    found = [recall_of(row, length) for row in rows]
    return [
        Column(
            task.replace("_", " "),
            f"exact answers in sequences of {length:,} tokens; ± 95 % over seeds, or 95 % over answers",
            tuple(_share(each.get(task)) for each in found),
        )
        for task in dict.fromkeys(task for each in found for task in each)
    ]


def _share(found: Estimate | None) -> Cell:
    if found is None:
        return Cell("", None)
    if found.count > 1:
        return Cell(_with_bounds(found, "{:.0%}".format, "{:.0%}".format), found.mean)
    return Cell(f"{found.mean:.0%} ({found.low:.0%} to {found.high:.0%})", found.mean)


def _fixed(places: int) -> Callable[[float], str]:
    return lambda value: f"{value:.{places}f}"


def _estimates(rows: Sequence[Row], name: str, title: str, hint: str, form: Callable[[float], str]) -> Column:
    cells = []
    for row in rows:
        found = row.values.get(name)
        bounds = found is not None and name in (BITS, LOSS)
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

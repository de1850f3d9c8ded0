"""The tables and files of scripts/probe.py, from the content of probe.json (configs/probing.py)."""

import csv
import io
import shlex
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from rich.table import Table

from data.units import short
from model.training.failures import size
from model.training.storage import make_folder, write_atomically, write_json
from scripts.console import counted
from scripts.reporting.markdown_table import bounded
from scripts.reporting.pictures import draw_probe, unit_name

LOSS_CHANGE = "loss change [95 % bounds]"
"""Header of changes, in the unit of the loss."""


def layer_table(label: str, result: Mapping[str, Any]) -> Table:
    """Returns the change of the loss by layer or KV head."""
    ((name, pattern),) = result["pattern"].items()
    settings = ", ".join(f"{key} {value}" for key, value in pattern.items() if key != "_target_")
    table = Table(
        title=f"{label} with one change at a time: {name}, {settings}",
        caption=f"{result['documents_from']}: {counted(result['documents'], 'document')}, {result['tokens']:,} tokens "
        f"in chunks of up to {result['longest']:,}; dense loss {result['dense_loss']:.4f} "
        f"{short(result['loss_unit'])}; 95 % bounds over documents",
    )
    last = result["units"][0]["by_position"][-1]
    far = result["mass_edges"].index(result["near"])
    table.add_column("layer" if _kind(result) == "layer" else "layer.head")
    late, distant = f"from token {last['start']:,} on", f"attention beyond {result['near']:,}"
    for column in (LOSS_CHANGE, late, distant):
        table.add_column(column, justify="right")
    for row in result["units"]:
        total, late = bounded(row["change"], row["low"], row["high"], "+"), row["by_position"][-1]["change"]
        table.add_row(unit_name(row), total, f"{late:+.4f}", f"{sum(row['mass'][far:]):.1%}")
    return table


def schedule_table(result: Mapping[str, Any]) -> Table:
    """Returns the measured schedules, from none dense to all dense."""
    rows = result["schedules"]
    dense = rows[-1]
    ranked = sorted(result["units"], key=lambda row: -row["change"])
    table = Table(
        title=f"Schedules by number of dense {_kind(result)}s, and their cost at {result['longest']:,} tokens"
    )
    for column in ("dense", "added", "predicted", LOSS_CHANGE, "FLOPs", "KV cache"):
        table.add_column(column, justify="right")
    for row in rows:
        measured, kept = row["measured"], row["kept"]
        if measured is None:
            continue
        table.add_row(
            str(kept),
            unit_name(ranked[kept - 1]) if kept else "",
            f"{row['predicted']:+.4f}",
            bounded(measured["change"], measured["low"], measured["high"], "+"),
            f"{row['attention_flops'] / dense['attention_flops']:.1%}",
            size(row["cache_bytes"]),
            style="bold" if kept == result["recommended"] else None,
        )
    return table


def recommendation(result: Mapping[str, Any], start: Sequence[str]) -> str:
    """Returns the recommended schedule as overrides for train.py. `start`: those that start from the probed weights."""
    kept, units = result["recommended"], len(result["units"])
    change = result["schedules"][kept]["measured"]["change"]
    return (
        f"With {kept} of {units} {_kind(result)}s dense the loss changes by {change:+.4f} {short(result['loss_unit'])} "
        f"(tolerance={result['tolerance']:g}). Overrides for train.py:\n"
        f"{shlex.join(start)} {result['overrides']}"
    )


def write_probe(result: Mapping[str, Any], output: Path, picture: Path) -> None:
    """Writes the result as `output` (JSON), a CSV beside it with a row per layer or KV head, and the picture."""
    make_folder(output.parent)
    write_json(output, result)
    positions = [(each["start"], each["stop"]) for each in result["units"][0]["by_position"]]
    distances = list(pairwise(result["mass_edges"]))
    lines = io.StringIO()
    writer = csv.writer(lines, lineterminator="\n")
    writer.writerow(
        ["layer", "head", "change", "low", "high"]
        + [f"change_{start}_{stop}" for start, stop in positions]
        + [f"mass_{start}_{stop}" for start, stop in distances]
    )
    for row in result["units"]:
        by_position = [each["change"] for each in row["by_position"]]
        writer.writerow([row["layer"], row["head"], row["change"], row["low"], row["high"], *by_position, *row["mass"]])
    write_atomically(output.with_suffix(".csv"), lines.getvalue())
    draw_probe(result, picture)


def _kind(result: Mapping[str, Any]) -> str:
    return "layer" if result["units"][0]["head"] is None else "KV head"

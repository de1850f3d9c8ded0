"""The files of a comparison of several runs on the same documents.

<output>/
  comparison.json   every row in full, and the differences      comparison.csv   one line a run
  comparison.md     the tables                                  loss_by_position.png
"""

import csv
import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from data.units import BITS, LOSS, short, units_in
from model.training.storage import make_folder, write_atomically, write_json
from scripts.reporting.markdown_table import bounded, table
from scripts.reporting.pictures import draw_loss_by_position
from scripts.reporting.run_table import scored_text

COLUMNS = (
    *("run", "checkpoint", "documents_from", "precision", "documents", "bytes", "words", "tokens_scored", "nll_nats"),
    *("loss", "loss_low", "loss_high", "perplexity", "word_perplexity"),
    *("bits_per_byte", "bits_per_byte_low", "bits_per_byte_high"),
    *("protocol", "window", "stride", "min_context", "bos", "tokenizer"),
)
"""Columns of comparison.csv."""


def write_comparison(folder: Path, result: Mapping[str, Any]) -> None:
    """Writes the files. `result`: the content of comparison.json, {"rows", "differences"}."""
    make_folder(folder)
    rows = result["rows"]
    write_json(folder / "comparison.json", result)
    lines = io.StringIO()
    writer = csv.DictWriter(lines, COLUMNS, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for row in rows:
        protocol = row["protocol"] | {"protocol": row["protocol"]["name"]}
        writer.writerow(row | protocol | {"tokenizer": _tokenizer(row)})
    write_atomically(folder / "comparison.csv", lines.getvalue())
    text = comparison_markdown(result) + "\n![Loss by position](loss_by_position.png)\n"
    write_atomically(folder / "comparison.md", text)
    draw_loss_by_position(rows, brief_names([row["run"] for row in rows]), folder / "loss_by_position.png")


def comparison_markdown(result: Mapping[str, Any]) -> str:
    """Returns the tables of the runs, their differences, and the loss by position."""
    rows, first = result["rows"], result["rows"][0]
    units = units_in(first)
    loss, bits = f"loss ({short(units[LOSS])})", [units[BITS]] if BITS in units else []
    labels = [row["run"] for row in rows]
    names = dict(zip(labels, brief_names(labels), strict=True))
    parts = [
        f"# {len(rows)} models on the same documents",
        f"{scored_text(first)}, {first['words']:,} words. {_protocol(first['protocol'])}"
        + " In brackets: 95 % bounds over documents." * (first["documents"] > 1),
        "\n".join(f"- {names[row['run']]}: {row['checkpoint']}, tokenizer {_tokenizer(row)}" for row in rows),
        table(
            ("run", "tokens scored", loss, *bits, "perplexity", "word perplexity"),
            [
                (
                    names[row["run"]],
                    f"{row['tokens_scored']:,}",
                    _bounds(row, "loss"),
                    *(_bounds(row, BITS) for _ in bits),
                    f"{row['perplexity']:.2f}",
                    "" if row["word_perplexity"] is None else f"{row['word_perplexity']:,.1f}",
                )
                for row in rows
            ],
        ),
    ]
    if result["differences"]:
        parts += [
            "## Paired difference",
            "Negative: better than the other run.",
            table(
                ("run", "against", loss, *bits, "better documents"),
                [
                    (
                        names[d["run"]],
                        names[d["against"]],
                        "other tokens" if d["loss"] is None else _bounds(d, "loss", "+"),
                        *(_bounds(d, BITS, "+") for _ in bits),
                        f"{d['documents_better']} of {d['documents']}",
                    )
                    for d in result["differences"]
                ],
            ),
        ]
    parts += [f"## Loss by position ({short(units[LOSS])})", _by_position(rows, list(names.values()))]
    return "\n\n".join(parts) + "\n"


def brief_names(labels: Sequence[str]) -> list[str]:
    """Returns the labels without their run folders ("window" of window/2026-01-31_12-00-00_000000); where two runs
    would have one name, their numbers come first."""
    short = [re.sub(r"/[^/ ]+", "", label, count=1) for label in labels]
    if len(set(short)) == len(set(labels)):
        return short
    return [f"{labels.index(label) + 1} {name}" for label, name in zip(labels, short, strict=True)]


def _protocol(protocol: Mapping[str, Any]) -> str:
    window, stride = protocol["window"], protocol["stride"]
    return {
        "whole": "Each document is read in one pass.",
        "sliding": f"Sliding windows of {window:,} tokens, {stride or 0:,} apart.",
        "chunked": f"Chunks of {window:,} tokens, each without what is before it.",
    }[protocol["name"]]


def _by_position(rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> str:
    edges = sorted({(bucket["start"], bucket["stop"]) for row in rows for bucket in row["by_position"]})
    buckets = [{bucket["start"]: bucket for bucket in row["by_position"]} for row in rows]
    lines = []
    for start, stop in edges:
        found = [by_start.get(start) for by_start in buckets]
        cells = ["" if b is None else bounded(b["loss"], b["low"], b["high"]) for b in found]
        lines.append((f"{start:,} to {stop:,}", *cells))
    return table(("tokens", *names), lines)


def _tokenizer(row: Mapping[str, Any]) -> str:
    """The tokenizer's name, the first digits of the hash of its content, if it was trained, and whether it is lossy."""
    identity = row["tokenizer"]
    return " ".join([identity["tokenizer"], identity.get("content", "")[:8], "lossy" * ("lossy" in identity)]).strip()


def _bounds(values: Mapping[str, Any], name: str, sign: str = "") -> str:
    if values[name] is None:
        return "-"
    return bounded(values[name], values[f"{name}_low"], values[f"{name}_high"], sign)

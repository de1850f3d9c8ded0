"""Reads the files in docs/results, and makes tables of their rows."""

import csv
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from scripts.benchmarks.results import markdown

RESULTS = Path(__file__).parent / "results"


def read(file: str) -> Any:
    """Returns the contents of a JSON file in docs/results."""
    return json.loads((RESULTS / file).read_text())


def report_rows(sweep: str) -> dict[str, dict[str, str]]:
    """Returns the rows of a sweep's report, by pattern."""
    with (RESULTS / sweep / "report/pareto.csv").open() as file:
        return {row["label"]: row for row in csv.DictReader(file)}


def table(file: str, columns: Iterable[str] | None = None, **equal: Any) -> str:
    """Returns the rows of a result file as a Markdown table: the given columns of those rows whose values equal
    `equal`. Default: all columns but those of `equal`."""
    rows = [row for row in read(file)["rows"] if all(row[key] == value for key, value in equal.items())]
    return markdown([{key: row[key] for key in columns or row if columns or key not in equal} for row in rows])


def where(rows: Iterable[Mapping[str, Any]], **equal: Any) -> Mapping[str, Any]:
    """Returns the only row whose values equal `equal`."""
    (row,) = (row for row in rows if all(row[key] == value for key, value in equal.items()))
    return row

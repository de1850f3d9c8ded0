"""The results of a benchmark: a JSON file with device and versions, and the same numbers as a Markdown table."""

import argparse
import json
import os
import platform
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

PEERS = ("flash-attn-4", "nvidia-cutlass-dsl", "fla-core", "attn-gym")
"""Packages whose versions are recorded if they are installed."""


def surroundings() -> dict[str, Any]:
    """Returns the device, the versions of packages, and the date."""
    import torch

    on_gpu = torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name()
        if on_gpu
        else f"CPU, {os.cpu_count()} cores, {torch.get_num_threads()} threads",
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "triton": _version("triton")}
        | {name: found for name in PEERS if (found := _version(name))},
        "date": datetime.now().date().isoformat(),
    }


def earlier_rows(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Returns the rows to which a run with `--append` adds its own: those of `arguments.output`, if it exists. Without
    `--append`, an empty list."""
    if not arguments.append or not arguments.output.exists():
        return []
    return json.loads(arguments.output.read_text())["rows"]


def write(arguments: argparse.Namespace, rows: Sequence[Mapping[str, Any]]) -> None:
    """Writes the surroundings, the arguments as settings, and the rows to the file `arguments.output`."""
    from model.training.storage import make_folder, write_atomically

    settings = {key: value for key, value in vars(arguments).items() if key != "output"}
    make_folder(arguments.output.parent)
    content = {**surroundings(), "settings": settings, "rows": list(rows)}
    write_atomically(arguments.output, json.dumps(content, indent=1) + "\n")


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """Returns the rows as a Markdown table; their keys are the columns."""
    columns = list(rows[0])
    cell = lambda value: f"{value:,.4g}" if isinstance(value, float) else str(value)  # noqa: E731
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(cell(row[column]) for column in columns) + " |" for row in rows]
    return "\n".join(lines)


def _version(package: str) -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return None

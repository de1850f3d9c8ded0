"""Markdown tables, and numbers with their bounds in them."""

import re
from collections.abc import Sequence


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A GitHub table. Cells are single lines of Markdown; a `|` in them must be escaped (`escape`)."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def bounded(value: float, low: float, high: float, sign: str = "") -> str:
    return f"{value:{sign}.4f} [{low:{sign}.4f}, {high:{sign}.4f}]"


def escape(text: str) -> str:
    """Text from a file as literal text in one line of Markdown: no markup, no HTML, no cell's end."""
    literal = re.sub(r"[\\`*\[\]|~]|^#|(?<![^\W_])_|_(?![^\W_])", r"\\\g<0>", " ".join(text.split()))
    return literal.replace("&", "&amp;").replace("<", "&lt;")

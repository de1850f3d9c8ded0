"""Formats Markdown tables, and table cells of numbers with confidence bounds."""

import re
from collections.abc import Sequence


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Returns a GitHub table. Cells are single lines of Markdown, with `|` escaped (`escape`)."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def bounded(value: float, low: float | None, high: float | None, sign: str = "") -> str:
    """Returns the number with its bounds in brackets, or alone without them."""
    if low is None or high is None:
        return f"{value:{sign}.4f}"
    return f"{value:{sign}.4f} [{low:{sign}.4f}, {high:{sign}.4f}]"


def escape(text: str) -> str:
    """Escapes Markdown, HTML and table separators in a text, and joins its lines."""
    literal = re.sub(r"[\\`*\[\]|~]|^#|(?<![^\W_])_|_(?![^\W_])", r"\\\g<0>", " ".join(text.split()))
    return literal.replace("&", "&amp;").replace("<", "&lt;")

"""Writes report.html: one file for offline use, with light and dark colours, also for phones.

The template escapes every value. A content security policy allows the page its own script, styles and embedded
pictures, and no request at all.
"""

import base64
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from scripts.reporting.content import Content, reason, standing, surroundings
from scripts.reporting.figures import legend_names, to_inline_svg
from scripts.reporting.scaling_text import READING, header, heading, table_of
from scripts.reporting.style import DARK, LIGHT, css_variables

TEMPLATES = Path(__file__).parent / "templates"
TINT = {"light": "#f4f6f8", "dark": "#1f262e"}

SECTIONS = {
    "scaling": ("Loss and compute", READING),
    "pareto": (
        "Quality against cost",
        "Lower is better, left is cheaper. The grey steps are the Pareto front. The dotted lines cross at dense. "
        "The dashed line is the control. "
        "Bars are 95 % intervals over seeds; long bars of a cost are cut off.",
    ),
    "loss_curves": (
        "Training loss",
        "The first steps are cut off at the top. Training time excludes evaluation and compilation. Faint lines are "
        "unfinished jobs.",
    ),
    "loss_by_position": (
        "Loss by position",
        "Held-out loss by position in the document. Bands are 95 % intervals over documents, averaged over seeds. "
        "Bands of the difference to dense are 95 % intervals over seeds.",
    ),
    "loss_by_context": (
        "Loss by context",
        "Held-out loss of the same tokens, given more and more context, and how much of it context saves, relative to "
        "the shortest one. Bands are 95 % intervals of this paired difference over documents, averaged over seeds.",
    ),
}

ROUTING_HINTS = {
    "entropy": "how evenly the router selects blocks; 1 is uniform",
    "never_chosen": "fraction of eligible blocks that no query selected",
    "age": "mean distance to a selected block, in tokens",
    "union": "different blocks that 8 consecutive queries select, per selection",
    "recall": "fraction of dense attention on visible keys",
    "indexer_loss": "nats per query",
}


def write_page(content: Content, pictures: Mapping[str, bytes]) -> str:
    """Returns the page as HTML. `pictures`: PNG bytes of each row's patterns, by the row's label."""
    script = (TEMPLATES / "report.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    light, dark = (css_variables(colors | {"tint": TINT[name]}) for name, colors in (("light", LIGHT), ("dark", DARK)))
    css = (TEMPLATES / "report.css").read_text(encoding="utf-8")
    labels = [row.label for row in content.rows]
    progress = "; ".join((content.progress, *content.budgets))
    environment = Environment(loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined)
    environment.filters["double"] = lambda width: f"{2 * width:g}"
    return environment.get_template("report.html.jinja").render(
        content=content,
        policy=f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; img-src data:",
        style=f":root{{{light}}}@media (prefers-color-scheme: dark){{:root{{{dark}}}}}\n{css}",
        script=script,
        summary=progress[:1].upper() + progress[1:],
        comparisons=[_split_label(line, labels) for line in content.comparisons],
        legend=list(zip(content.styles, legend_names(content.rows), strict=True)),
        styled_rows=list(zip(content.rows, content.styles, strict=True)),
        laws=[
            (heading(each, len(content.scaling)), each.held_out, header(each), table_of(each))
            for each in content.scaling
        ],
        sections={name: _section(content, name) for name in SECTIONS},
        pictures=[(name, base64.b64encode(pictures[name]).decode()) for name in labels if name in pictures],
        routing_names=list(dict.fromkeys(name for _, values in content.routing for name in values)),
        routing_hints=ROUTING_HINTS,
        ended=[(job, reason(job)) for job in content.ended],
        pending=[(job, standing(job)) for job in content.pending],
        sweep_commands=[(sweep.name, sweep.command) for sweep in content.sweeps if sweep.command],
        row_commands=[
            (row.label, commands) for row in content.rows if (commands := [j.command for j in row.jobs if j.command])
        ],
        surroundings=surroundings(content),
    )


def _section(content: Content, name: str) -> dict[str, Any] | None:
    """Returns title, hint and figures of a section; None if it has no figure."""
    if name not in content.figures or (name == "pareto" and not any(row.values for row in content.rows)):
        return None
    title, hint = SECTIONS[name]
    figures = []
    for index, (label, draw) in enumerate(content.figures[name]):
        description = f"{title}: {label}. The numbers are in the table." if name == "pareto" else label
        figures.append((label, description, to_inline_svg(draw, f"{name}_{index}")))
    return {"title": title, "hint": hint, "figures": figures}


def _split_label(line: str, labels: Sequence[str]) -> tuple[str, str]:
    """Splits a sentence into the label of a row at its start, which the page shows in bold, and the rest."""
    label = max((label for label in labels if line.startswith(f"{label} ")), key=len, default="")
    return label, line[len(label) :]

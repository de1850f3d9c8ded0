"""report.html: one file that opens offline, on a phone as well, light or dark.

Everything that comes from a file is escaped; a content security policy allows the page its own script, its own styles
and pictures within it, and no request at all.
"""

import base64
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path

from scripts.reporting.aggregate import Row
from scripts.reporting.content import Content, reason, standing, surroundings
from scripts.reporting.figures import legend_names, to_inline_svg
from scripts.reporting.jobs import Job
from scripts.reporting.style import DARK, LIGHT, Style, css_variables

HERE = Path(__file__).parent
TINT = {"light": "#f4f6f8", "dark": "#1f262e"}

SECTIONS = {
    "pareto": (
        "Quality against cost",
        "Down is better, left is cheaper. The grey stairs are the Pareto front: below and left of them nothing was "
        "found. Dotted lines cross at dense. Bars are 95 % intervals over seeds; long ones of a cost run out of the "
        "picture.",
    ),
    "loss_curves": (
        "Loss while training",
        "The first steps are cut off at the top. Training time is without evaluation and compilation. Faint lines: "
        "jobs that are not done.",
    ),
    "loss_by_position": (
        "Loss by position",
        "Held-out loss against how far into its document a token is. Bands are 95 % over documents, the mean of the "
        "seeds'; of the difference to dense, over seeds.",
    ),
}

ROUTING = {
    "entropy": "how evenly blocks are used, 1 is even",
    "never_chosen": "share of eligible blocks that no query chose",
    "age": "tokens back to a chosen block, on average",
    "union": "different blocks that 8 queries in a row choose, over their choices",
    "recall": "share of dense attention that falls on what is seen",
    "indexer_loss": "nats a query",
}


def write_page(content: Content, pictures: Mapping[str, bytes]) -> str:
    """The whole page. `pictures`: PNG bytes of a row's patterns, by its label."""
    script = (HERE / "report.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; img-src data:"
    light, dark = (css_variables(colors | {"tint": TINT[name]}) for name, colors in (("light", LIGHT), ("dark", DARK)))
    style = f":root{{{light}}}@media (prefers-color-scheme: dark){{:root{{{dark}}}}}\n" + (
        HERE / "report.css"
    ).read_text(encoding="utf-8")
    body = [
        _head(content),
        _figures(content, "pareto"),
        _table(content),
        *(_figures(content, name) for name in ("loss_curves", "loss_by_position") if name in content.figures),
        _patterns(content, pictures),
        _routing(content),
        _ended(content),
        _pending(content),
        _commands(content),
        _surroundings(content),
    ]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n<link rel="icon" href="data:,">\n'
        f"<title>{escape(content.title)}: quality and cost</title>\n<style>{style}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(part for part in body if part)
        + f"\n</main>\n<script>{script}</script>\n</body>\n</html>\n"
    )


def _head(content: Content) -> str:
    told = "; ".join((content.progress, *content.footing))
    cautions = _list(map(escape, content.cautions), "cautions") if content.cautions else ""
    labels = [row.label for row in content.rows]
    subject = _list(map(escape, content.subject), "subject soft") if content.subject else ""
    readings = _list(_bold(line, labels) for line in content.readings)
    return (
        '<header>\n<p class="kicker">Farsight: quality and cost of attention patterns</p>\n'
        f"<h1>{escape(content.title)}</h1>\n"
        f'<p class="soft">{escape(told[:1].upper() + told[1:])}.</p>\n'
        f"{subject}\n</header>\n"
        f'<section class="short">\n<h2>In short</h2>\n{readings}\n{cautions}\n</section>'
    )


def _figures(content: Content, name: str) -> str:
    title, hint = SECTIONS[name]
    if name == "pareto" and not any(row.values for row in content.rows):
        return ""
    figures = []
    for place, (label, draw) in enumerate(content.figures[name]):
        svg = to_inline_svg(draw, f"{name}_{place}")
        alternative = f"{title}: {label}. The numbers are in the table." if name == "pareto" else label
        figures.append(
            f'<figure role="img" aria-label="{escape(alternative)}"><figcaption>{escape(label)}</figcaption>'
            f"{svg}</figure>"
        )
    pairs = "" if len(figures) == 3 else " pairs"
    return (
        f'<section>\n<h2>{title}</h2>\n<p class="hint">{hint}</p>\n{_legend(content)}\n'
        f'<div class="panels{pairs}">\n{"".join(figures)}\n</div>\n</section>'
    )


def _legend(content: Content) -> str:
    named = zip(content.styles, legend_names(content.rows), strict=True)
    items = [f"<li>{_key(style)}{escape(name)}</li>" for style, name in named]
    return f'<ul class="legend">{"".join(items)}</ul>'


def _key(style: Style) -> str:
    dash = "" if style.dash is None else f' stroke-dasharray="{" ".join(f"{2 * part:g}" for part in style.dash)}"'
    return (
        '<svg class="key" viewBox="0 0 24 12" aria-hidden="true" focusable="false">'
        f'<path d="M0 6h24" stroke="var(--{style.role})" stroke-width="2"{dash}/>'
        f'<path d="{style.path}" fill="var(--{style.role})" stroke="var(--paper)" stroke-width=".8"/></svg>'
    )


def _table(content: Content) -> str:
    kind = lambda column: "" if column.numeric else ' class="text"'  # noqa: E731
    heads = "".join(
        f'<th scope="col"{kind(column)} title="{escape(column.hint)}">'
        f'<button type="button">{escape(column.title)}</button></th>'
        for column in content.columns
    )
    lines = []
    for index, (row, style) in enumerate(zip(content.rows, content.styles, strict=True)):
        cells = []
        for place, column in enumerate(content.columns):
            cell = column.cells[index]
            order = "" if cell.order is None else f' data-order="{escape(str(cell.order))}"'
            if place == 0:
                number = f"{index + 1} " if len(content.rows) > 1 else ""
                named = (
                    f'<span class="name">{_key(style)}<span class="number">{number}</span>{escape(cell.text)}</span>'
                )
                cells.append(f'<th scope="row" class="text"{order}>{named}</th>')
            else:
                cells.append(f"<td{kind(column)}{order}>{escape(cell.text)}</td>")
        lines.append(('<tr class="baseline">' if row.baseline else "<tr>") + "".join(cells) + "</tr>")
    return (
        '<section>\n<h2>Table</h2>\n<p class="hint">Press a heading to sort by it. The same numbers in full are in '
        "pareto.csv.</p>\n"
        '<div class="scroll" tabindex="0" role="region" aria-label="Table of all patterns, scrolls sideways">'
        '<table class="sortable"><caption class="unseen">Quality and cost of every pattern</caption>'
        f"<thead><tr>{heads}</tr></thead><tbody>{''.join(lines)}</tbody></table></div>\n</section>"
    )


def _patterns(content: Content, pictures: Mapping[str, bytes]) -> str:
    figures = [
        f"<figure><figcaption>{escape(row.label)}</figcaption>"
        f'<img alt="Which keys each query of {escape(row.label)} sees" '
        f'src="data:image/png;base64,{base64.b64encode(pictures[row.label]).decode()}"></figure>'
        for row in content.rows
        if row.label in pictures
    ]
    if not figures:
        return ""
    return (
        '<section>\n<h2>Patterns</h2>\n<p class="hint">Queries from top to bottom, keys from left to right. Filled is '
        "seen; paler is seen in a summary, or where a router may choose it."
        f'</p>\n<div class="patterns">{"".join(figures)}</div>\n</section>'
    )


def _routing(content: Content) -> str:
    if not content.routing:
        return ""
    names = list(dict.fromkeys(name for _, found in content.routing for name in found))
    heads = "".join(f'<th scope="col" title="{escape(ROUTING.get(name, ""))}">{escape(name)}</th>' for name in names)
    lines = "".join(
        f'<tr><th scope="row" class="text">{escape(row.label)}</th>'
        + "".join(f"<td>{f'{found[name]:,.4g}' if name in found else ''}</td>" for name in names)
        + "</tr>"
        for row, found in content.routing
    )
    told = "; ".join(f"{name}: {ROUTING[name]}" for name in names if name in ROUTING)
    return (
        f'<section>\n<h2>Routing</h2>\n<p class="hint">As last logged. {escape(told)}.</p>\n'
        '<div class="scroll" tabindex="0" role="region" aria-label="Routing health"><table><thead><tr>'
        f'<th scope="col" class="text">pattern</th>{heads}</tr></thead><tbody>{lines}</tbody></table></div>\n</section>'
    )


def _ended(content: Content) -> str:
    return _jobs(content.ended_title, content.ended, reason)


def _pending(content: Content) -> str:
    return _jobs("Still to come", content.pending, standing)


def _jobs(title: str, jobs: list[Job], say: object) -> str:
    if not jobs:
        return ""
    parts = []
    for job in jobs:
        trace = (
            f"<details><summary>Traceback</summary><pre>{escape(job.traceback)}</pre></details>"
            if job.traceback
            else ""
        )
        parts.append(
            f'<div class="job"><strong>{escape(_name(job))}</strong> <span class="state">{escape(job.state)}</span> '
            f'<span class="soft">{escape(say(job))}</span>{trace}</div>'
        )
    return f"<section>\n<h2>{title}</h2>\n{''.join(parts)}\n</section>"


def _commands(content: Content) -> str:
    whole = [
        f"<p>The whole of {escape(sweep.name)}:</p><pre>{escape(sweep.command)}</pre>"
        for sweep in content.sweeps
        if sweep.command
    ]
    rows = [_row_commands(row) for row in content.rows if any(job.command for job in row.jobs)]
    if not whole and not rows:
        return ""
    return (
        '<section>\n<h2>Commands</h2>\n<p class="hint">Each reproduces its job alone.</p>\n'
        f"{''.join(whole)}\n{''.join(rows)}\n</section>"
    )


def _row_commands(row: Row) -> str:
    commands = "".join(f"<pre>{escape(job.command)}</pre>" for job in row.jobs if job.command)
    return f"<details><summary>{escape(row.label)}</summary>{commands}</details>"


def _surroundings(content: Content) -> str:
    lines = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in surroundings(content))
    return f"<section>\n<h2>Versions and device</h2>\n<dl>{lines}</dl>\n</section>" if lines else ""


def _list(lines: Iterable[str], kind: str = "") -> str:
    """A list of lines of HTML."""
    named = f' class="{kind}"' if kind else ""
    return f"<ul{named}>{''.join(f'<li>{line}</li>' for line in lines)}</ul>"


def _bold(line: str, labels: Sequence[str]) -> str:
    """The line as HTML; a pattern that it begins with stands out."""
    label = max((label for label in labels if line.startswith(f"{label} ")), key=len, default="")
    return (f"<strong>{escape(label)}</strong>" if label else "") + escape(line[len(label) :])


def _name(job: Job) -> str:
    return job.label if job.seed is None else f"{job.label}, seed {job.seed}"

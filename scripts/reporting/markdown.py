"""Writes report.md, for a terminal, a pull request, or a note."""

from scripts.reporting.content import Content, reason, standing, surroundings
from scripts.reporting.markdown_table import bounded, escape, table
from scripts.reporting.scaling_text import READING, header, heading, table_of
from scripts.reporting.table import OF_DIFFERENCES


def write_markdown(content: Content) -> str:
    parts = [
        f"# {escape(content.title)}",
        escape(f"{content.progress}; {'; '.join(content.budgets)}."),
        _list(list(content.subject)),
        "## Findings",
        _list([*content.comparisons, *content.cautions]),
        *_scaling(content),
        "## Quality against cost",
        f"![Held-out quality against {', '.join(title for title, _ in content.figures['pareto'])}](pareto.png)",
        _table(content),
        f"Differences are {OF_DIFFERENCES}." * any(column.title.startswith("vs ") for column in content.columns),
    ]
    titles = {
        "loss_curves": "Training loss",
        "loss_by_position": "Loss by position",
        "loss_by_context": "Loss by context",
    }
    for name, title in titles.items():
        if name in content.figures:
            parts += [f"## {title}", f"![{title}]({name}.png)"]
    if content.contexts:
        parts.append(_contexts(content))
    if "summary" in content.figures:
        parts.append("For print: [summary.pdf](summary.pdf), [summary.svg](summary.svg).")
    if content.routing:
        names = list(dict.fromkeys(name for _, found in content.routing for name in found))
        lines = [
            (escape(row.label), *(f"{found[name]:,.4g}" if name in found else "" for name in names))
            for row, found in content.routing
        ]
        parts += ["## Routing", table(("pattern", *map(escape, names)), lines)]
    if content.ended:
        parts += [f"## {content.ended_title}"]
        for job in content.ended:
            parts.append(f"- {escape(f'{job.label}, seed {job.seed}: {job.state}: {reason(job)}')}")
            if job.traceback:
                parts.append("\n".join(f"      {line}" for line in job.traceback.rstrip().splitlines()))
    if content.pending:
        lines = [(escape(job.label), str(job.seed), job.state, escape(standing(job))) for job in content.pending]
        parts += ["## Unfinished jobs", table(("pattern", "seed", "state", "progress"), lines)]
    commands = [f"{sweep.command}" for sweep in content.sweeps if sweep.command]
    commands += [job.command for job in content.jobs if job.command]
    if commands:
        parts += ["## Commands", "\n".join(f"    {' '.join(command.split())}" for command in commands)]
    parts += ["## Versions and device", _list([f"{name}: {value}" for name, value in surroundings(content)])]
    return "\n\n".join(part for part in parts if part) + "\n"


def _scaling(content: Content) -> list[str]:
    parts = []
    for each in content.scaling:
        lines = [tuple(map(escape, line)) for line in table_of(each)]
        parts += [f"## {escape(heading(each, len(content.scaling)))}"]
        if lines:
            parts += ["![Loss against training FLOPs](scaling.png)", escape(READING), table(header(each), lines)]
        parts.append(escape(f"Everything below is of the jobs with {each.held_out:.3g} FLOPs."))
    return parts


def _contexts(content: Content) -> str:
    """The loss of the same tokens by the amount of context, with 95 % bounds over documents."""
    columns = sorted({entry["context"] for _, contexts in content.contexts for entry in contexts})
    lines = []
    for row, contexts in content.contexts:
        cells = {entry["context"]: bounded(entry["loss"], entry.get("low"), entry.get("high")) for entry in contexts}
        lines.append((escape(row.label), *(cells.get(context, "") for context in columns)))
    return table(("pattern", *(f"{context:,}" for context in columns)), lines)


def _table(content: Content) -> str:
    lines = [
        tuple(escape(column.cells[index].text) for column in content.columns) for index in range(len(content.rows))
    ]
    return table([escape(column.title) for column in content.columns], lines)


def _list(lines: list[str]) -> str:
    return "\n".join(f"- {escape(line)}" for line in lines)

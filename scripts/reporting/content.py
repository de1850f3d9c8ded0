"""Gathers everything that report.md, report.html and wandb show."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from data.units import BITS, LOSS
from scripts.reporting import findings
from scripts.reporting.aggregate import Row, make_rows, unit_in
from scripts.reporting.cautions import cautions
from scripts.reporting.contexts import by_context_of
from scripts.reporting.curves import curve_of, position_differences_of, positions_of, routing_of
from scripts.reporting.figures import (
    Draw,
    cost_panels,
    draw_contexts,
    draw_curves,
    draw_gains,
    draw_position_differences,
    draw_positions,
)
from scripts.reporting.jobs import Job, Sweep
from scripts.reporting.manifest import FAILED, INTERRUPTED, OUT_OF_MEMORY
from scripts.reporting.read_jobs import read_sweeps
from scripts.reporting.scaling import Scaling, at_largest_budget, fit_sweep, is_scaling
from scripts.reporting.scaling_figure import draw_scaling
from scripts.reporting.scaling_text import limits, sentences
from scripts.reporting.style import Style, make_styles
from scripts.reporting.subject import subject
from scripts.reporting.table import Column, make_columns

CURVES = (("train", "training", True), ("validation", "validation", False))
"""(stage in metrics.csv, title of the figure, whether it is smoothed)."""


@dataclass(frozen=True)
class Content:
    """The content of a report, without its form."""

    sweeps: tuple[Sweep, ...]
    rows: tuple[Row, ...]
    styles: tuple[Style, ...]
    columns: tuple[Column, ...]
    title: str
    progress: str
    budgets: tuple[str, ...]
    subject: tuple[str, ...]
    comparisons: tuple[str, ...]
    cautions: tuple[str, ...]
    figures: dict[str, tuple[tuple[str, Draw], ...]]  # {name of the file: ((title of a panel, its drawing), ...)}
    contexts: tuple[tuple[Row, list[dict[str, float]]], ...]  # the loss by context
    routing: tuple[tuple[Row, dict[str, float]], ...]
    scaling: tuple[Scaling, ...] = ()  # of the sweeps with several budgets

    @property
    def jobs(self) -> list[Job]:
        return [job for sweep in self.sweeps for job in sweep.jobs]

    @property
    def ended(self) -> list[Job]:
        """Jobs that ended without results: failed, out of memory, interrupted, or done and not evaluated."""
        bad = (FAILED, OUT_OF_MEMORY, INTERRUPTED)
        return [job for job in self.jobs if job.state in bad or (job.state == "done" and not job.counted)]

    @property
    def ended_title(self) -> str:
        """The heading of `ended`. Interrupted jobs have not failed, because they can be resumed."""
        interrupted = [job.state == "interrupted" for job in self.ended]
        if all(interrupted):
            return "Interrupted jobs"
        return "Failed and interrupted jobs" if any(interrupted) else "Failed jobs"

    @property
    def pending(self) -> list[Job]:
        return [job for job in self.jobs if job.state in ("running", "waiting")]


def gather(folders: Sequence[str | Path]) -> Content:
    """Reads the folders. Raises RunFolderError if one of them is neither a sweep nor a run."""
    sweeps = tuple(read_sweeps(folders))
    rows = tuple(make_rows([at_largest_budget(sweep) for sweep in sweeps]))
    scaling = tuple(fit_sweep(sweep) for sweep in sweeps if is_scaling(sweep))
    laws = [line for each in scaling for line in sentences(each)]
    styles = tuple(make_styles(rows))
    figures = {"pareto": tuple((findings.COST_NAMES[cost], draw) for cost, draw in cost_panels(rows, styles).items())}
    timed = all(sweep.timed for sweep in sweeps)
    if curves := _panels_of_curves(rows, styles, BITS, timed) or _panels_of_curves(rows, styles, LOSS, timed):
        figures["loss_curves"] = tuple(curves)
    styled = {"styles": styles, "unit": unit_in(rows, LOSS)}
    positions = [positions_of(row) for row in rows]
    if any(positions):
        panels = [("held-out loss", partial(draw_positions, positions=positions, **styled))]
        less = [position_differences_of(row) for row in rows]
        if any(less):
            drawn = partial(draw_position_differences, differences=less, **styled)
            panels.append(("difference to dense at the same positions", drawn))
        figures["loss_by_position"] = tuple(panels)
    contexts = [by_context_of(row) for row in rows]
    if any(contexts):
        panels = [("loss of the same tokens", partial(draw_contexts, contexts=contexts, **styled))]
        if any("gain" in entry for each in contexts for entry in each):
            panels.append(("what context saves", partial(draw_gains, contexts=contexts, **styled)))
        figures["loss_by_context"] = tuple(panels)
    if fitted := [each for each in scaling if each.fits]:
        figures["scaling"] = tuple((each.sweep, partial(draw_scaling, scaling=each)) for each in fitted)
    measured = any(row.values for row in rows)
    if measured:
        # The losses themselves: what context saves is relative to a row's loss at short context, which differs by row.
        figures["summary"] = (figures["pareto"][0], *figures.get("loss_by_context", ())[:1])
    return Content(
        sweeps=sweeps,
        rows=rows,
        styles=styles,
        columns=tuple(make_columns(rows)),
        title=findings.title_of(sweeps),
        progress=findings.progress(sweeps),
        budgets=tuple(findings.budgets(sweeps)),
        subject=tuple(subject([job for sweep in sweeps for job in sweep.jobs])),
        comparisons=tuple(
            findings.without_times(sweeps) + laws + (findings.comparisons(rows) if measured or not laws else [])
        ),
        cautions=tuple([line for each in scaling for line in limits(each)] + cautions(sweeps, rows)),
        figures=figures,
        contexts=tuple((row, each) for row, each in zip(rows, contexts, strict=True) if each),
        routing=tuple((row, found) for row in rows if (found := routing_of(row))),
        scaling=scaling,
    )


def _panels_of_curves(rows: Sequence[Row], styles: Sequence[Style], number: str, timed: bool) -> list[tuple[str, Draw]]:
    """Returns (title, drawing) of the CURVES of BITS or LOSS that a job logged at two steps.

    timed: whether the jobs' times compare.
    """
    panels = []
    for stage, kind, smooth in CURVES:
        found = [curve_of(row, f"{stage}/{number}", smooth) if number in row.units else None for row in rows]
        label = unit_in(rows, number) + ", smoothed" * smooth
        if any(curve is not None for curve in found):
            panels += [
                (f"{kind}, by {title}", partial(draw_curves, curves=found, styles=styles, along=along, label=label))
                for along, title in (("tokens", "tokens"), ("seconds", "training time"))
                if along == "tokens" or timed
            ]
    return panels


def surroundings(content: Content) -> list[tuple[str, str]]:
    """Returns (name, value) of device and versions, from the jobs' summaries or, before any, from their sweeps."""
    told: dict[str, list[str]] = {}
    sources = [job.summary for job in content.jobs if job.summary] or [
        {"device": sweep.device, "versions": sweep.versions} for sweep in content.sweeps
    ]
    sources += [{"versions": sweep.versions} for sweep in content.sweeps]
    for source in sources:
        versions = source.get("versions")
        named = {"device": source.get("device"), "devices per job": source.get("devices")}
        named |= versions if isinstance(versions, dict) else {}
        for name, value in named.items():
            if value is not None and str(value) not in told.setdefault(name, []):
                told[name].append(str(value))
    return [(name, ", ".join(values)) for name, values in told.items() if values]


def reason(job: Job) -> str:
    """Returns in one line why a job has no results."""
    parts = [job.exit_reason or "", *job.problems]
    if job.state == "done" and not job.counted:
        parts.append("therefore not evaluated on held-out text")
    return "; ".join(part for part in parts if part) or "unknown reason"


def standing(job: Job) -> str:
    """Returns the progress of an unfinished job: "step 120, training bits per byte 2.31"."""
    steps = [row["step"] for row in job.metrics]
    if not steps:
        return "nothing logged yet" if job.state == "running" else ""
    logged = {name: row[f"train/{name}"] for row in job.metrics for name in job.units if f"train/{name}" in row}
    name = BITS if BITS in logged else LOSS
    most = job.setting("trainer", "max_steps")
    parts = [f"step {int(steps[-1]):,}" + (f" of {most:,}" if isinstance(most, int) else "")]
    return ", ".join(parts + ([f"training {job.units[name]} {logged[name]:.4f}"] if name in logged else []))

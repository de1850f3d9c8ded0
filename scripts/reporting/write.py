"""Writes a report's folder. Works at any time, also before the first job has finished."""

import logging
import os
from collections.abc import Sequence
from pathlib import Path

from model.training.storage import make_folder, write_atomically
from scripts.reporting.content import Content, gather
from scripts.reporting.figures import to_files
from scripts.reporting.jobs import Job
from scripts.reporting.markdown import write_markdown
from scripts.reporting.page import write_page
from scripts.reporting.scaling_text import write_scaling_csv
from scripts.reporting.table import write_csv

log = logging.getLogger("farsight")


def write_report(folders: Sequence[str | Path], output: Path | None = None, wandb: bool | None = None) -> Path:
    """Writes pareto.csv, report.md, report.html and the figures (PNG, SVG; summary also PDF), each atomically.

    Args:
        folders: sweeps (a manifest.json), runs (a config.yaml), or folders of runs, in one report.
        output: the folder to write to. None: `report` in the first folder if that is a sweep or a folder of runs, or
            beside it if it is a run.
        wandb: whether to log table and figures as wandb artifacts. None: if the jobs use the wandb logger and none is
            running or waiting.

    Returns:
        The path of report.html.

    Raises:
        RunFolderError: a folder is neither a sweep nor a run. Nothing is written then.
    """
    content = gather(folders)
    output = Path(output) if output is not None else _home(Path(folders[0]), content)
    make_folder(output)
    pictures = _pictures(content, output)
    write_atomically(output / "pareto.csv", write_csv(content.rows))
    if content.scaling:
        write_atomically(output / "scaling.csv", write_scaling_csv(content.scaling))
    for name, panels in content.figures.items():
        draws, pdf = [draw for _, draw in panels], name in ("summary", "scaling")
        legend = ((), ()) if name == "scaling" else (content.rows, content.styles)  # it has its own
        for file, drawn in to_files(draws, name, *legend, pdf).items():
            write_atomically(output / file, drawn)
    write_atomically(output / "report.md", write_markdown(content))
    write_atomically(output / "report.html", write_page(content, pictures))
    if wandb or (wandb is None and not content.pending and _chose_wandb(content)):
        from scripts.reporting.wandb_log import log_to_wandb

        log_to_wandb(content, output)
    return output / "report.html"


def _home(first: Path, content: Content) -> Path:
    """Returns report/ of a sweep, or beside a run, whose own report/ has its pictures."""
    if (first / "manifest.json").is_file():
        return first / "report"
    return (first.parent if (first / "config.yaml").is_file() else first) / "report"


def _chose_wandb(content: Content) -> bool:
    return any(job.setting("logger", "name") == "wandb" for job in content.jobs)


def _pictures(content: Content, output: Path) -> dict[str, bytes]:
    """Returns {label: a PNG of the row's patterns}, from one of its runs or drawn from a config."""
    found = {}
    for row in content.rows:
        jobs = sorted(row.jobs, key=lambda job: not job.counted)
        files = [job.folder / "report" / "pattern.png" for job in jobs]
        drawn = next((file for file in files if file.is_file()), None)
        drawn = drawn or next((file for job in jobs if (file := _draw_pattern(job, output))), None)
        if drawn is not None:
            found[row.label] = drawn.read_bytes()
    return found


def _draw_pattern(job: Job, output: Path) -> Path | None:
    """Draws the patterns of a run that ended before it drew them; None if its config is incomplete."""
    file = output / "patterns" / f"{job.hash}.png"
    length = job.setting("data", "sequence_length")
    if file.is_file() or not job.config.get("attention") or not isinstance(length, int) or length < 1:
        return file if file.is_file() else None
    from configs.build import ConfigError, build_plan
    from scripts.reporting.pictures import draw_patterns

    try:
        plan = build_plan(job.config["attention"])
        partial = file.with_name(f"{job.hash}.{os.getpid()}.partial.png")
        draw_patterns(plan.patterns, length, partial, plan.block)
        os.replace(partial, file)
    except (ConfigError, KeyError, TypeError, AttributeError) as error:
        log.warning("%s: its pattern cannot be drawn: %s", job.label, error)
        return None
    return file

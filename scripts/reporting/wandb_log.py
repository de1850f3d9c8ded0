"""Logs a report's table and figures to wandb, offline unless the jobs' own logger is online."""

import csv
import hashlib
from pathlib import Path

from scripts.reporting.content import Content

PAGE_FILES = ("pareto.csv", "report.md", "report.html")


def log_to_wandb(content: Content, folder: Path, mode: str | None = None) -> Path | None:
    """Logs the table and figures in `folder` (of write_report), and an artifact with all files.

    The wandb run's group is the sweep's name. Its id depends on `folder`, so that writing the report again continues
    the same wandb run.

    Args:
        mode: offline | online | disabled; None: that of the jobs' logger, or offline.

    Returns:
        The folder of the wandb run, for `wandb sync`; None if the mode is disabled.
    """
    import wandb

    loggers = [job.config["logger"] for job in content.jobs if job.setting("logger", "name") == "wandb"]
    settings = loggers[0] if loggers else {}
    group = content.sweeps[0].name or None
    run = wandb.init(
        project=settings.get("project") or "farsight",
        group=group or settings.get("group"),
        name=f"{group or 'runs'}/report",
        id=hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:12],
        resume="allow",
        job_type="report",
        dir=folder,
        mode=mode or settings.get("mode") or "offline",
        reinit="create_new",  # a job of the same process may have a run of its own open
        settings=wandb.Settings(silent=True, console="off"),
    )
    with run:
        header, *lines = csv.reader((folder / "pareto.csv").read_text(encoding="utf-8").splitlines(keepends=True))
        figures = [folder / f"{name}.png" for name in content.figures]
        pictures = {figure.stem: wandb.Image(str(figure)) for figure in figures if figure.is_file()}
        run.log({"pareto_table": wandb.Table(columns=header, data=lines)} | pictures)
        artifact = wandb.Artifact(
            f"report-{run.id}", type="report", metadata={"sweeps": [s.name for s in content.sweeps]}
        )
        for file in [folder / name for name in PAGE_FILES] + [
            f.with_suffix(end) for f in figures for end in (".png", ".svg", ".pdf")
        ]:
            if file.is_file():
                artifact.add_file(str(file))
        run.log_artifact(artifact)
        place = Path(run.dir).parent if not run.disabled else None
    return place

"""Describes the model, the training data, the evaluation and the dates of a report's jobs."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from configs.mixture import choice_of
from scripts.console import counted
from scripts.reporting.jobs import Job
from scripts.reporting.run_table import size_of


def subject(jobs: Sequence[Job]) -> list[str]:
    """Returns lines from the jobs' configs and evaluations. Where jobs differ, every value appears once."""
    jobs = [job for job in jobs if job.config]
    evaluated = [job.evaluation for job in jobs if job.counted]
    of_model = [
        _each(jobs, lambda job: job.setting("model", "name")),
        _each(jobs, lambda job: job.setting("model", "layers"), "{:,} layers"),
        _each(jobs, lambda job: job.setting("model", "width"), "width {:,}"),
        _span([number for job in jobs if (number := job.number("parameters")) is not None], "{:,.0f} parameters"),
    ]
    of_text = [
        _each(jobs, _text),
        _each(jobs, lambda job: job.setting("data", "sequence_length"), "sequences of {:,} tokens"),
    ]
    of_evaluation = [
        _each(evaluated, lambda row: row.get("documents_from")),
        _each(evaluated, lambda row: row.get("documents") and counted(row["documents"], "document")),
        _each(evaluated, lambda row: size_of(row) if {"bytes", "tokens_scored"} <= row.keys() else None),
        _each(evaluated, lambda row: (row.get("excerpt_of") or {}).get("limit"), "evaluation.limit={}"),
        _each(evaluated, lambda row: (row.get("protocol") or {}).get("name"), "protocol {}"),
    ]
    days = sorted({str(time)[:10] for job in jobs for time in (job.started, job.ended) if time})
    parts = (
        ("Model", of_model),
        ("Trained on", of_text),
        ("Evaluated on", of_evaluation),
        ("Ran", [days[0] if days[0] == days[-1] else f"{days[0]} to {days[-1]}"] if days else []),
    )
    return [f"{name}: {', '.join(filter(None, told))}" for name, told in parts if any(told)]


def _text(job: Job) -> str | None:
    """Returns the choice of `data`, and the name of the file or folder."""
    source, path = job.setting("data", "source"), job.setting("data", "path")
    name = ""
    if isinstance(source, Mapping):
        choice = "mixture" if "sources" in source else choice_of(source)
        name = f"data={choice}" if choice else str(source.get("_target_", ""))
    return " ".join(filter(None, (name, Path(path).name if isinstance(path, str) else ""))) or None


def _each(things: Iterable[Any], value_of: Callable[[Any], Any], form: str = "{}") -> str:
    """Returns every value once, in this form: "sequences of 1,024 / 2,048 tokens"."""
    found = dict.fromkeys(value for thing in things if isinstance(value := value_of(thing), str | int))
    before, between, after = form.partition("{:,}" if "{:,}" in form else "{}")
    return before + " / ".join(between.format(value) for value in found) + after if found else ""


def _span(numbers: Sequence[float], form: str) -> str:
    if not numbers:
        return ""
    low, high = min(numbers), max(numbers)
    return form.format(low) if low == high else f"{low:,.0f} to " + form.format(high)

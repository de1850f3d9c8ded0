"""Reads the jobs of sweeps and runs from their folders, with the problems of files that cannot be read.

Accepts a sweep's folder (a manifest.json and one run folder for each job), a run folder, and a folder of run folders.
Files may be missing, cut off, or not written yet, because reports are also written while jobs run.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from configs.aliases import upgrade
from data.units import BITS, LOSS, quality_in, units_in
from model.training.metrics import read_rows
from model.training.run_folder import RunFolder, RunFolderError
from scripts.reporting.jobs import STATES, Job, Sweep, finite, setting_in
from scripts.reporting.manifest import (
    DONE,
    INTERRUPTED,
    MANIFEST_FILE,
    PATTERN,
    RUNNING,
    JobEntry,
    read_manifest,
    was_killed,
)
from scripts.reporting.sharing import shared_a_device, used_by_others

RUN_STATES = {"finished": DONE, "trained": INTERRUPTED}
"""{state of a run in summary.json: state of its job, where they differ}."""

KILLED = "its process was killed; launch the sweep again to resume it"
"""The exit reason of a job whose manifest entry is still "running"."""

LENGTHS_OF_RUNS = ("trainer.max_steps", "trainer.max_seconds")

OF_CONTROLS = ("data.sequence_length", "data.batch_size", "data.validation_sequences", "evaluation.", "model.rope_")
"""Settings in which a control differs from its baseline."""


def read_sweeps(folders: Iterable[str | Path]) -> list[Sweep]:
    """Reads the sweeps among `folders`, in order. Runs outside of sweeps form one more sweep, which comes last.

    Raises:
        RunFolderError: a folder is neither a sweep nor a run, or its manifest.json cannot be read.
    """
    sweeps, runs = [], []
    for folder in dict.fromkeys(Path(folder).expanduser().resolve() for folder in folders):
        if (folder / MANIFEST_FILE).is_file():
            sweeps.append(_read_sweep(folder))
            continue
        found = (
            [folder] if (folder / "config.yaml").is_file() else sorted(f.parent for f in folder.glob("*/config.yaml"))
        )
        if not found:
            raise RunFolderError(
                f"{folder}: must be a sweep, a run, or a folder of runs; it has no manifest.json and no config.yaml"
            )
        runs += [run for run in found if run not in runs]
    if not runs:
        return sweeps
    jobs = tuple(_read_runs(runs))
    return [*sweeps, Sweep("", runs[0].parent, jobs, timed=not used_by_others(job.summary for job in jobs))]


def _read_sweep(folder: Path) -> Sweep:
    manifest = read_manifest(folder)
    killed = {entry.hash for entry in manifest.jobs if was_killed(folder, entry)}
    if killed:  # a job may have ended after the manifest was read and before its lock was tested
        manifest = read_manifest(folder)
    for entry in manifest.jobs:
        if entry.state not in STATES:
            raise RunFolderError(
                f"{folder / MANIFEST_FILE}: state={entry.state} of job {entry.hash}: must be one of {', '.join(STATES)}"
            )
        if entry.hash in killed and entry.state == RUNNING:
            entry.state, entry.exit_reason = INTERRUPTED, KILLED
    latest = {_identity(entry): entry.hash for entry in manifest.jobs}
    replaced = {entry.hash for entry in manifest.jobs if latest[_identity(entry)] != entry.hash}
    jobs: dict[str, Job] = {}
    for entry in sorted(manifest.jobs, key=lambda entry: entry.first_stage is not None):  # first stages first
        first_stage = jobs.get(entry.first_stage or "")
        jobs[entry.hash] = _read_job(manifest.sweep, folder, entry, bool(manifest.match), first_stage)
    return Sweep(
        name=manifest.sweep,
        folder=folder,
        jobs=tuple(jobs[entry.hash] for entry in manifest.jobs if entry.hash not in replaced),
        replaced=tuple(sorted(replaced)),
        match=manifest.match,
        budget=manifest.budget,
        command=manifest.command,
        versions=manifest.versions,
        device=manifest.device,
        timed=not (shared_a_device(manifest.jobs) or used_by_others(job.summary for job in jobs.values())),
    )


def _identity(entry: JobEntry) -> tuple:
    """Returns what two jobs of one sweep have in common only if one replaces the other: a default in a YAML file has
    changed since, and so has the config hash. Both would count as runs of one seed."""
    derived = ("init_from=",) * (entry.first_stage is not None)
    derived += ("evaluation.by_context.", "evaluation.limit=") * (entry.role != PATTERN)
    overrides = sorted(text for text in entry.overrides if not derived or not text.startswith(derived))
    return entry.role, entry.seed, entry.flops, *overrides


def _read_job(sweep: str, folder: Path, entry: JobEntry, matched: bool, first_stage: Job | None) -> Job:
    path = folder / entry.folder
    own = ("attention", "seed") + (LENGTHS_OF_RUNS if matched else ())  # a match gives each job its own length
    own += ("init_from",) if entry.first_stage else ()  # another one for every seed
    other = sorted(text for text in entry.overrides if not text.lstrip("+~").startswith(own))
    other += [] if entry.flops is None else [f"sweep.flops={entry.flops:.12g}"]
    shared = [text for text in other if not text.startswith(OF_CONTROLS)]
    return Job(
        sweep=sweep,
        folder=path,
        hash=entry.hash,
        label=entry.label,
        state=entry.state,
        seed=entry.seed,
        baseline=entry.baseline,
        role=entry.role,
        first_stage=first_stage,
        flops=entry.flops,
        pattern=entry.pattern or "",
        context=" ".join(other),
        shared=" ".join(shared),
        overrides=tuple(entry.overrides),
        command=entry.command,
        exit_reason=entry.exit_reason,
        traceback=entry.traceback,
        started=entry.started,
        ended=entry.ended,
        **_read_run(path, entry.state),
    )


def _read_runs(folders: Sequence[Path]) -> Iterable[Job]:
    """Reads runs without a manifest; their labels come from their configs."""
    read = [_read_run(folder, "done") for folder in folders]
    labels = _labels([run["config"] for run in read])
    for folder, label, run in zip(folders, labels, read, strict=True):
        config, summary = run["config"], run["summary"]
        state = summary.get("state", "running" if summary or run["metrics"] else "waiting")
        state = RUN_STATES.get(state, state)
        yield Job(
            sweep="",
            folder=folder,
            hash=str(summary.get("config_hash") or folder.name),
            label=label,
            state=state if state in STATES else "failed",
            seed=config.get("seed"),
            baseline=setting_in(config, "attention", "name") == "dense",
            context=json.dumps(_settings(config, without=("attention", "seed")), sort_keys=True, default=str),
            # The config is complete. The last overrides keep Hydra from creating a folder and a log.
            command=f"python train.py --config-path {folder} --config-name config "
            "hydra.run.dir=. hydra.output_subdir=null hydra/job_logging=none",
            exit_reason=f"summary.json says {state!r}" if state not in ("done", "running", "waiting") else None,
            **(run | {"problems": run["problems"] if state == "done" else ()}),
        )


def _read_run(folder: Path, state: str) -> dict[str, Any]:
    """Reads the files of a run folder, as arguments of Job."""
    problems: list[str] = []
    files = RunFolder(folder)

    def read(name: str, parse: Any, default: Any) -> Any:
        if not (folder / name).is_file():
            if state == "done":
                problems.append(f"{name} is missing")
            return default
        try:
            return parse()
        except (OSError, ValueError, KeyError, TypeError, AttributeError, yaml.YAMLError) as error:
            problems.append(f"{name} cannot be read ({_one_line(error)})")
            return default

    config = read("config.yaml", lambda: upgrade(files.read_config()), {})
    summary = read("summary.json", lambda: dict(files.read_summary()), {})
    evaluation = read("evaluation.json", lambda: _held_out(folder / "evaluation.json", config, summary), None)
    metrics = read("metrics.csv", lambda: _read_metrics(files.metrics_file), ())
    recall = {}
    if (folder / "recall.json").is_file():  # that of the last checkpoint on the run's own documents
        recall = read("recall.json", lambda: _read_recall(folder / "recall.json"), {})
    source = setting_in(config, "data", "source")
    summary, evaluation = (row and {**row, "units": units_in(row, source)} for row in (summary, evaluation))
    if evaluation is not None and finite(evaluation.get(quality := quality_in(units_in(evaluation)))) is None:
        problems.append(f"evaluation.json has no finite {quality}")
        evaluation = None
    return {
        "config": config,
        "summary": summary,
        "evaluation": evaluation,
        "metrics": metrics,
        "recall": recall,
        "problems": tuple(problems),
    }


def _held_out(file: Path, config: Mapping[str, Any], summary: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the row of evaluation.json that the run wrote at its end. evaluate.py may have added others."""
    rows = [dict(row) for row in json.loads(file.read_text(encoding="utf-8"))["rows"]]
    if not rows:
        raise ValueError("it has no rows")
    split = setting_in(config, "evaluation", "split")
    own = [row for row in rows if all(row.get(key) == summary.get(key) for key in (BITS, LOSS))]
    last = [
        row
        for row in rows
        if row.get("checkpoint") == "checkpoints/last.ckpt"
        and row.get("split", row.get("documents_from")) == split  # older rows name their split there
    ]
    return (own or last or rows)[0]


def _read_recall(file: Path) -> dict[str, dict[int, tuple[int, int]]]:
    """Returns {task: {length: (exact answers, answers)}} over all depths and distances."""
    found: dict[str, dict[int, tuple[int, int]]] = {}
    for row in json.loads(file.read_text(encoding="utf-8"))["rows"]:
        by_length = found.setdefault(row["task"], {})
        exact, asked = by_length.get(row["length"], (0, 0))
        by_length[row["length"]] = exact + round(row["exact_match"] * row["answers"]), asked + row["answers"]
    return found


def _read_metrics(file: Path) -> list[dict[str, float]]:
    rows = []
    for row in read_rows(file)[1]:
        numbers = {}
        for key, cell in row.items():
            try:
                number = finite(float(cell))
            except (TypeError, ValueError):  # not logged in this row, or the line is being written
                continue
            if number is not None and key is not None:
                numbers[key] = number
        if "step" in numbers:
            rows.append(numbers)
    return rows


def _labels(configs: Sequence[Mapping[str, Any]]) -> list[str]:
    """Returns the attention's name of each run, followed by the settings in which runs of that name differ."""
    names = [str(setting_in(config, "attention", "name") or config.get("name") or "run") for config in configs]
    flat = [dict(_flatten(_settings(config, without=("seed",)))) for config in configs]
    labels = []
    for name, own in zip(names, flat, strict=True):
        others = [other for other_name, other in zip(names, flat, strict=True) if other_name == name]
        differing = [key for key in own if any(other.get(key) != own[key] for other in others)]
        labels.append(" ".join([name, *(f"{key.rpartition('.')[2]}={own[key]}" for key in sorted(differing))]))
    return labels


def _settings(config: Mapping[str, Any], without: Sequence[str]) -> dict[str, Any]:
    """Returns the settings that affect results: without names, folders, `resume` and the logger."""
    left_out = {"name", "outputs", "resume", "logger", *without}
    settings = {key: value for key, value in config.items() if key not in left_out}
    if "seed" in without and isinstance(settings.get("data"), Mapping):  # data.seed equals the run's seed
        settings["data"] = {key: value for key, value in settings["data"].items() if key != "seed"}
    return settings


def _flatten(settings: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, str]]:
    for key, value in settings.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", str(value)


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())

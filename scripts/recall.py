"""evaluate.py suite=recall: tasks that need what lies far back, at growing lengths. Writes recall.json and a picture;
of one's own documents recall_<digest>.json, so that they never replace the run's own result.

recall.json: {"checkpoint", "documents_from", "documents_digest", "tokenizer", "protocol", "rows": [{task, length,
depth, distance, answers, exact_match, nll (nats an answer), nll_per_token}], "exact_match": {task: {length: share}},
"effective_length": {task: tokens}}
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from configs.build import ConfigError, build_task
from configs.checks import check_evaluate
from configs.runs import Run, open_documents, open_run
from data import CorpusError
from data.recall.text import Material
from data.texts import digest
from model.evaluation import Answer, answer, effective_length
from model.evaluation.recall import BAR
from model.precision import autocast
from model.training.run_folder import check_writable, write_json
from model.training.storage import make_folder
from scripts.console import progress_bar

log = logging.getLogger("farsight")

SHORTEST = 1024
"""Tokens of the first of the lengths that are chosen where none are given."""

Case = tuple[str, int, dict[str, float]]
"""A task's name, the length, and its depth or distance."""


def evaluate_recall(config: dict[str, Any]) -> list[dict[str, Any]]:
    """Every run that `config["checkpoint"]` names: scores it, prints a table, writes recall.json. Returns what that
    holds."""
    check_evaluate(config)
    named = config["checkpoint"]
    several = isinstance(named, list)
    if several and config["output"]:
        raise ConfigError(f"output={config['output']}: must be null for several runs, each has its own recall.json")
    return [_evaluate_run(checkpoint, config) for checkpoint in (named if several else [named])]


def _evaluate_run(checkpoint: str, config: Mapping[str, Any]) -> dict[str, Any]:
    settings = config["recall"]
    run = open_run(checkpoint, config["accelerator"], config["precision"])
    which = "" if run.checkpoint.stem == "last" else f"_{run.checkpoint.stem}"  # each checkpoint has its own
    check_writable(Path(config["output"]).parent if config["output"] else run.folder, config["output"])
    documents, name = open_documents(run, config["evaluation"]["split"], config.get("data"))
    which += f"_{digest(documents)[:8]}" if config.get("data") else ""
    output = Path(config["output"]) if config["output"] else run.folder / f"recall{which}.json"
    material = Material.of(run.tokenizer, (documents.tokens(index) for index in range(len(documents))))
    rows = []
    cases = list(_cases(settings, run))
    total = settings["samples"] * sum(length for _, length, _ in cases)
    with progress_bar(f"{run.label}, recall", total) as progress, autocast(run.model, config["precision"]):
        for task, length, where in cases:
            found = _ask(run, material, settings, (task, length, where), config["seed"], progress)
            rows.append({"task": task, "length": length, "depth": None, "distance": None} | where | _summary(found))
    match = {
        task: _by_length([row for row in rows if row["task"] == task]) for task in dict.fromkeys(c[0] for c in cases)
    }
    result = {
        "checkpoint": str(run.checkpoint.absolute().relative_to(run.folder)),
        "documents_from": name,
        "documents_digest": digest(documents),
        "tokenizer": run.tokenizer.identity(),
        "protocol": {
            **{"name": "recall", "samples": settings["samples"], "bos": True, "bar": BAR, "seed": config["seed"]},
            "precision": config["precision"],
        },
        "rows": rows,
        "exact_match": match,
        "effective_length": {task: effective_length(shares) for task, shares in match.items()},
    }
    make_folder(output.parent)
    write_json(output, result)
    by_depth = [row for row in rows if row["depth"] is not None]
    if by_depth:
        from scripts.reporting.pictures import draw_recall

        folder = output.parent if config["output"] else run.folder / "report"
        draw_recall(by_depth, folder / f"recall_passkey{which}.png")
    _print(run.label, result)
    log.info("written to %s", output)
    return result


def _cases(settings: Mapping[str, Any], run: Run) -> Iterator[Case]:
    """Everything that is asked, shortest first."""
    limit = run.model.config.max_length
    lengths = settings["lengths"] or _lengths(run.sequence_length)
    if max(lengths) > limit:
        raise ConfigError(f"recall.lengths={list(lengths)}: must be at most the model's limit, {limit}")
    for length in sorted(lengths):
        for task, entry in settings["tasks"].items():
            if entry is None:
                continue
            if task == "passkey":
                yield from ((task, length, {"depth": depth}) for depth in settings["depths"])
            elif task == "copy":
                size = entry["cue"] + entry["size"]
                distances = settings["distances"] or _distances(run, length, size)
                yield from ((task, length, {"distance": d}) for d in distances if size <= d <= length - size)
            else:
                yield task, length, {}


def _lengths(longest: int) -> list[int]:
    """SHORTEST, twice that, ..., up to `longest`; `longest` alone where that is shorter."""
    lengths = [SHORTEST << doubling for doubling in range(longest.bit_length()) if SHORTEST << doubling <= longest]
    return lengths or [longest]


def _distances(run: Run, length: int, size: int) -> list[int]:
    """One token before, at and after everything at which a pattern of the run changes its view; half of the length; and
    as far as fits."""
    plan, layers = run.model.plan, run.model.config.layers
    edges = {plan.block}
    for pattern in plan.patterns.values():
        edges |= {*pattern.edges, *(layers * edge for edge in pattern.edges)}
    around = {edge + step for edge in edges for step in (-1, 0, 1)}
    return sorted(d for d in around | {length // 2, length - size} if size <= d <= length - size)


def _ask(
    run: Run,
    material: Material,
    settings: Mapping[str, Any],
    case: Case,
    seed: int,
    progress: Callable[[int], None],
) -> list[Answer]:
    """The answers to `samples` sequences of one case; the same sequences for every run of one tokenizer."""
    task, length, where = case
    make = build_task(f"recall.tasks.{task}", settings["tasks"][task])
    at_once = max(1, settings["tokens_at_once"] // length)
    answers: list[Answer] = []
    for first in range(0, settings["samples"], at_once):
        numbers = range(first, min(first + at_once, settings["samples"]))
        generators = (np.random.default_rng((seed, length, *task.encode(), number)) for number in numbers)
        try:
            samples = [make(material, length, generator, **where) for generator in generators]
        except (CorpusError, TypeError) as error:
            raise ConfigError(f"recall.tasks.{task} at recall.lengths={length}: {error}") from None
        batch = {name: torch.cat([s[name] for s in samples]) for name in samples[0]}
        answers += answer(run.model, batch, run.tokenizer.vocabulary)
        progress(length * len(samples))
    return answers


def _summary(answers: Sequence[Answer]) -> dict[str, float]:
    nats, tokens = sum(a.nll for a in answers), sum(a.tokens for a in answers)
    return {
        "answers": len(answers),
        "exact_match": sum(a.exact for a in answers) / len(answers),
        "nll": nats / len(answers),
        "nll_per_token": nats / tokens,
    }


def _by_length(rows: Sequence[Mapping[str, Any]]) -> dict[int, float]:
    """{length: share of exact answers}, over all depths and distances."""
    lengths = dict.fromkeys(row["length"] for row in rows)
    of = {length: [row for row in rows if row["length"] == length] for length in lengths}
    return {
        length: sum(row["exact_match"] * row["answers"] for row in found) / sum(row["answers"] for row in found)
        for length, found in of.items()
    }


def _print(label: str, result: Mapping[str, Any]) -> None:
    lengths = sorted({row["length"] for row in result["rows"]})
    table = Table(title=f"{label}: exact answers by length", caption=f"effective: the longest length with {BAR:.1%}")
    table.add_column("task")
    for column in (*(f"{length:,}" for length in lengths), "effective"):
        table.add_column(column, justify="right")
    for task, shares in result["exact_match"].items():
        cells = [f"{shares[length]:.0%}" if length in shares else "" for length in lengths]
        effective = result["effective_length"][task]
        table.add_row(task, *cells, "none" if effective is None else f"{effective:,}")
    Console().print(table)

"""The recall suite that a composed `recall` group describes.

recall.json: {"checkpoint", "documents_from", "documents_digest", "tokenizer", "protocol", "rows": [{task, length,
depth, distance, answers, exact_match, interval (95 %), nll (nats an answer), nll_per_token}],
"exact_match": {task: {length: share}}, "effective_length": {task: tokens}}
"""

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from configs.build import ConfigError, build_task
from configs.runs import Run
from data import CorpusError, InMemoryDocuments
from data.corpus import Split
from data.in_memory import digest
from data.recall.haystack import Material
from data.recall.retrieval import distances_that_fit
from model.evaluation.loss_store import LossStore, fingerprint
from model.evaluation.recall import BAR, Answer, effective_length
from model.evaluation.recall_suite import (
    Case,
    ask,
    default_distances,
    default_lengths,
    exact_match_by_length,
    octaves,
    summarize_answers,
)
from model.evaluation.scorer import FOLDER, ProgressBar
from model.precision import autocast

log = logging.getLogger(__name__)


def measure_recall(
    run: Run,
    documents: Split | InMemoryDocuments,
    name: str,
    config: Mapping[str, Any],
    progress_bar: ProgressBar,
    store: LossStore,
) -> dict[str, Any]:
    """Measures the recall of a run. Returns the content of its recall.json, and logs the result of each case.

    Args:
        documents: facts are inserted into their text.
        name: of the documents.
        config: the composed config of scripts/evaluate.py.
        store: of finished cases (`recall_store`); they are not asked again.
    """
    settings = config["recall"]
    cases = list(recall_cases(settings, run))
    material = Material.of(run.tokenizer, (documents.tokens(index) for index in range(len(documents))))

    def task(case: Case, generator: np.random.Generator) -> Mapping[str, Tensor]:
        make = build_task(f"recall.tasks.{case.task}", settings["tasks"][case.task])
        try:
            return make(material, case.length, generator, **case.where)
        except (CorpusError, TypeError) as error:
            raise ConfigError(f"recall.tasks.{case.task} at recall.lengths={case.length}: {error}") from None

    for case in {case.task: case for case in reversed(cases)}.values():  # the shortest of each task: one that does not
        task(case, np.random.default_rng(config["seed"]))  # fit is refused before the others are asked
    rows = []
    total = settings["samples"] * sum(case.length for case in cases)
    with progress_bar(f"{run.label}, recall", total) as progress, autocast(run.model, run.precision):
        for case in cases:
            where = "".join(f"_{key}_{value}" for key, value in case.where.items())
            file = f"{case.task}_{case.length}{where}"
            kept = store.load(file)
            if kept is None:
                answers = ask(
                    run.model,
                    case,
                    task,
                    samples=settings["samples"],
                    tokens_at_once=settings["tokens_at_once"],
                    seed=config["seed"],
                    vocabulary=run.tokenizer.vocabulary,
                    progress=progress,
                )
                store.save(file, np.array([(each.exact, each.nll, each.tokens) for each in answers]))
            else:
                answers = [Answer(bool(exact), float(nll), int(tokens)) for exact, nll, tokens in kept]
                progress(settings["samples"] * case.length)
            rows.append(summarize_answers(case, answers))
            log.info("%s: %.0f %% of %s answers", file, 100 * rows[-1]["exact_match"], f"{len(answers):,}")
    match = {
        each: exact_match_by_length([row for row in rows if row["task"] == each])
        for each in dict.fromkeys(case.task for case in cases)
    }
    return {
        "checkpoint": str(run.checkpoint.absolute().relative_to(run.folder)),
        "documents_from": name,
        "documents_digest": digest(documents),
        "tokenizer": run.tokenizer.identity(),
        "protocol": {
            **{"name": "recall", "samples": settings["samples"], "bos": True, "bar": BAR, "seed": config["seed"]},
            "precision": run.precision,
        },
        "rows": rows,
        "exact_match": match,
        "effective_length": {each: effective_length(shares) for each, shares in match.items()},
    }


def recall_store(run: Run, documents: Split | InMemoryDocuments, config: Mapping[str, Any], folder: Path) -> LossStore:
    """Returns the store, below `folder`, of the finished cases of a run under these settings."""
    answers = {key: config["recall"][key] for key in ("samples", "tasks")}
    settings = answers | {"protocol": "recall", "seed": config["seed"], "precision": run.precision}
    return LossStore(folder / FOLDER / fingerprint(run.checkpoint, documents, settings))


def recall_cases(settings: Mapping[str, Any], run: Run) -> Iterator[Case]:
    """Yields the cases of a `recall` group for a run, shortest first.

    Raises:
        ConfigError: a length exceeds the model's limit.
    """
    limit = run.model.config.max_length
    lengths = settings["lengths"] or default_lengths(run.sequence_length)
    if max(lengths) > limit:
        raise ConfigError(f"recall.lengths={list(lengths)}: must be at most the model's limit, {limit}")
    for length in sorted(lengths):
        for task, entry in settings["tasks"].items():
            if entry is None:
                continue
            if task == "passkey":
                yield from (Case(task, length, {"depth": depth}) for depth in settings["depths"])
            elif task == "copy":
                size = entry["cue"] + entry["size"]
                distances = settings["distances"] or default_distances(run.model, length, size)
                yield from (Case(task, length, {"distance": d}) for d in distances if size <= d <= length - size)
            elif task == "retrieval":
                nearest, farthest = distances_that_fit(run.tokenizer, length, entry["passage"])
                distances = settings["distances"] or octaves(nearest, farthest)
                fitting = [distance for distance in distances if nearest <= distance <= farthest]
                if not fitting:
                    accepted = f"long enough for recall.tasks.retrieval, at recall.distances of {nearest} to {farthest}"
                    raise ConfigError(f"recall.lengths={length}: must be {accepted}")
                yield from (Case(task, length, {"distance": distance}) for distance in fitting)
            else:
                yield Case(task, length, {})

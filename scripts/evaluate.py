"""Held-out perplexity and bits per byte of trained models, and what they recall.

    python scripts/evaluate.py checkpoint=outputs/window/2026-01-31_12-00-00_000000          a run: its own test split
    python scripts/evaluate.py checkpoint=RUN_DIR/last evaluation.protocol.stride=512
    python scripts/evaluate.py checkpoint=RUN_DIR data=files data.path=books/                one's own documents
    python scripts/evaluate.py 'checkpoint=[RUN_A,RUN_B]'                                    runs on the same tokens
    python scripts/evaluate.py suite=recall checkpoint=RUN_DIR                               what it finds far back

The result goes to the screen and into the run's evaluation.json, one row a checkpoint, precision, protocol and
documents; a comparison goes into a folder of its own. Scoring that was killed goes on where it was when the command is
given again.
"""

import sys
from pathlib import Path

if __name__ == "__main__":  # import this repository's packages, not files of this folder or installed namesakes
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import json
import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import hydra
from omegaconf import DictConfig, OmegaConf

if TYPE_CHECKING:
    from data import DataModule
    from model import Transformer
    from model.training.run_folder import RunFolder

log = logging.getLogger("farsight")


@hydra.main(version_base="1.3", config_path="../configs", config_name="evaluate")
def main(config: DictConfig) -> None:
    from configs.trust import trust_named
    from scripts.console import user_errors

    with user_errors():
        plain = trust_named(OmegaConf.to_container(config, resolve=True, throw_on_missing=True))
        if plain["suite"] == "recall":
            from scripts.recall import evaluate_recall

            evaluate_recall(plain)
        elif isinstance(plain["checkpoint"], list):
            from scripts.comparison import compare_checkpoints

            compare_checkpoints(plain)
        else:
            evaluate_checkpoint(plain)


def evaluate_checkpoint(config: dict[str, Any]) -> dict[str, Any]:
    """Loads what `config["checkpoint"]` names, scores it, prints a table, updates evaluation.json. Returns the row."""
    from rich.console import Console

    from configs.checks import check_evaluate, check_evaluation
    from configs.runs import open_corpus, open_documents, open_run
    from model.training.run_folder import check_writable
    from scripts.console import print_report
    from scripts.measuring import measure
    from scripts.scoring import Scoring

    check_evaluate(config)
    run = open_run(config["checkpoint"], config["accelerator"], config["precision"])
    settings = config["evaluation"]
    check_evaluation(settings, run.sequence_length, run.model.config.max_length)
    documents, name = open_documents(run, settings["split"], config.get("data"))
    output = Path(config["output"]) if config["output"] else run.folder / "evaluation.json"
    # Within the run's own file a checkpoint is named as seen from there, so that the folder may move.
    absolute = run.checkpoint.absolute()
    named = absolute if config["output"] else absolute.relative_to(run.folder)
    check_writable(output.parent, config["output"])
    scoring = Scoring(settings["tokens_at_once"], config["precision"], output.parent)
    corpus = open_corpus(run) if settings["baselines"] else None
    trained = run.tokenizer, run.sequence_length, corpus
    measured, _ = measure(run.model, documents, *trained, settings, scoring, run.checkpoint, run.label)
    split = None if config.get("data") else settings["split"]
    row = {
        "checkpoint": str(named),
        "documents_from": name,
        "split": split,
        "precision": config["precision"],
    } | measured
    add_row(output, row)
    scoring.finish()
    print_report(Console(), row)
    log.info("written to %s", output)
    return row


def evaluate_last(
    model: "Transformer", data: "DataModule", folder: "RunFolder", config: Mapping[str, Any]
) -> dict[str, Any]:
    """Scores the model that a run has just ended with, as its config says, and writes evaluation.json there."""
    from model.precision import device_of
    from scripts.measuring import measure
    from scripts.scoring import Scoring

    settings, trainer = config["evaluation"], config["trainer"]
    split = settings["split"]
    scoring = Scoring(settings["tokens_at_once"], trainer["precision"], folder.path)
    model.to(device_of(trainer["accelerator"]))
    trained = data.tokenizer, data.sequence_length, data.corpus
    measured, _ = measure(model, data.corpus.splits[split], *trained, settings, scoring, None, config["name"])
    scoring.finish()
    place = {"checkpoint": "checkpoints/last.ckpt", "documents_from": split, "split": split}
    row = place | {"precision": trainer["precision"]} | measured
    add_row(folder.path / "evaluation.json", row)
    return row


def add_row(path: Path, row: Mapping[str, Any]) -> None:
    """Adds `row` to the evaluations in `path`. It replaces one of the same checkpoint, precision, protocol, split and
    documents; documents are the same by their content, whatever they are called. Older rows, which lack that, stay."""
    from model.training.run_folder import write_json
    from model.training.storage import make_folder

    def identity(r: Mapping[str, Any]) -> tuple:
        protocol = json.dumps(r["protocol"], sort_keys=True)
        return r["checkpoint"], r.get("precision"), protocol, r.get("split"), r.get("documents_digest")

    make_folder(path.parent)
    rows = json.loads(path.read_text())["rows"] if path.exists() else []
    write_json(path, {"rows": [r for r in rows if identity(r) != identity(row)] + [dict(row)]})


if __name__ == "__main__":
    from scripts.console import run

    run(main)

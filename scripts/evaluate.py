"""Held-out perplexity and bits per byte of a trained model.

    python scripts/evaluate.py checkpoint=outputs/window/2026-01-31_12-00-00_000000          a run: its own test split
    python scripts/evaluate.py checkpoint=RUN_DIR/last evaluation.protocol.stride=512
    python scripts/evaluate.py checkpoint=RUN_DIR data=files data.path=books/                one's own documents

The result goes to the screen and into the run's evaluation.json, one row a checkpoint, protocol and documents.
"""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hydra
from omegaconf import DictConfig, OmegaConf

if TYPE_CHECKING:
    from data import DataModule
    from model import Transformer
    from model.evaluation.perplexity import Documents
    from model.training.run_folder import RunFolder

log = logging.getLogger("farsight")


@hydra.main(version_base="1.3", config_path="../configs", config_name="evaluate")
def main(config: DictConfig) -> None:
    from scripts.console import user_errors

    with user_errors():
        evaluate_checkpoint(OmegaConf.to_container(config, resolve=True, throw_on_missing=True))


def evaluate_checkpoint(config: dict[str, Any]) -> dict[str, Any]:
    """Loads what `config["checkpoint"]` names, scores it, prints a table, updates evaluation.json. Returns the row."""
    from rich.console import Console

    from configs.build import build_data, build_model
    from configs.checks import check_device, check_evaluation
    from data import Texts
    from model.training.checkpoints import load_weights, read_checkpoint
    from model.training.run_folder import find_checkpoint
    from scripts.console import print_report

    check_device(config["accelerator"], config["precision"])
    checkpoint = find_checkpoint(config["checkpoint"], prefer="last")
    run = read_checkpoint(checkpoint)["hyper_parameters"]
    check_evaluation(config["evaluation"], run["data"]["sequence_length"])
    data = build_data(run["data"])
    data.setup()
    model = build_model(run, data.vocabulary)
    load_weights(model, checkpoint)
    if config.get("data"):
        documents, name = Texts.load(config["data"], data.tokenizer), str(config["data"]["path"])
    else:
        name = config["evaluation"]["split"]
        documents = data.corpus.splits[name]
    run_folder = _run_folder(checkpoint)
    output = Path(config["output"]) if config["output"] else run_folder / "evaluation.json"
    # Within the run's own file a checkpoint is named as seen from there, so that the folder may move.
    named = checkpoint.absolute() if config["output"] else checkpoint.relative_to(run_folder)
    row = {"checkpoint": str(named), "documents_from": name}
    row |= score(model, documents, data, config["evaluation"], config["accelerator"], config["precision"])
    add_row(output, row)
    print_report(Console(), row)
    log.info("written to %s", output)
    return row


def evaluate_last(
    model: "Transformer", data: "DataModule", folder: "RunFolder", config: Mapping[str, Any]
) -> dict[str, Any]:
    """Scores the model that a run has just ended with, as its config says, and writes evaluation.json there."""
    split, trainer = config["evaluation"]["split"], config["trainer"]
    row = {"checkpoint": "checkpoints/last.ckpt", "documents_from": split}
    row |= score(
        model, data.corpus.splits[split], data, config["evaluation"], trainer["accelerator"], trainer["precision"]
    )
    add_row(folder.path / "evaluation.json", row)
    return row


def score(
    model: "Transformer",
    documents: "Documents",
    data: "DataModule",
    settings: Mapping[str, Any],
    accelerator: str,
    precision: str,
) -> dict[str, Any]:
    """A row of evaluation.json: `model` on `documents`, under the `evaluation` group's settings, with the baselines
    beside it.

    `data` is what the model was trained on: windows are as long as its sequences, the bigram model counts its training
    split.
    """
    import torch
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    from configs.build import build_protocol
    from data.baselines import bigram_bits_per_byte, gzip_bits_per_byte
    from model.evaluation import evaluate

    device = torch.device("cuda" if accelerator in ("cuda", "gpu", "auto") and torch.cuda.is_available() else "cpu")
    mixed = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(precision)
    total = sum(len(documents.tokens(d)) - 1 for d in range(len(documents)))
    columns = (TextColumn("evaluating"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with (
        Progress(*columns, console=Console(stderr=True), transient=True) as bar,
        torch.autocast(device.type, mixed, enabled=mixed is not None),
    ):
        task = bar.add_task("", total=total)
        result = evaluate(
            model.to(device),
            documents,
            build_protocol(settings["protocol"], data.sequence_length),
            tokens_at_once=settings["tokens_at_once"],
            long_document=settings["long_document"],
            progress=lambda tokens: bar.advance(task, tokens),
        )
    row = result.to_dict() | {"tokenizer": data.tokenizer.identity()}
    if settings["baselines"]:
        row["baselines"] = {
            "gzip_bits_per_byte": gzip_bits_per_byte(documents),
            "bigram_bits_per_byte": bigram_bits_per_byte(data.corpus, documents),
        }
    return row


def add_row(path: Path, row: Mapping[str, Any]) -> None:
    """Adds `row` to the evaluations in `path`; one of the same checkpoint, protocol and documents is replaced."""
    from model.training.run_folder import write_json

    def identity(r: Mapping[str, Any]) -> tuple:
        return r["checkpoint"], r["documents_from"], json.dumps(r["protocol"], sort_keys=True)

    rows = json.loads(path.read_text())["rows"] if path.exists() else []
    write_json(path, {"rows": [r for r in rows if identity(r) != identity(row)] + [dict(row)]})


def _run_folder(checkpoint: Path) -> Path:
    """The run that a checkpoint lies in, or its own folder where it was moved out of one."""
    run = checkpoint.parent.parent
    return run if (run / "config.yaml").is_file() else checkpoint.parent


if __name__ == "__main__":
    from scripts.console import run

    run(main)

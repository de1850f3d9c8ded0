"""Several runs on the same documents: one table, one picture, and the paired difference of each to the first.

<output>/
  comparison.json   every row in full, and the differences      comparison.csv   one line a run
  comparison.md     the tables                                  loss_by_position.png
"""

import csv
import io
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markdown import Markdown

from configs.build import ConfigError
from configs.checks import check_evaluate, check_evaluation
from configs.runs import Run, open_corpus, open_documents, open_run, retokenize, same_tokenizer
from model.evaluation import compare
from model.training.run_folder import check_writable, new_run_path, write_json
from model.training.storage import make_folder, write_atomically
from scripts.measuring import measure
from scripts.reporting.markdown_table import bounded, table
from scripts.scoring import Scoring

log = logging.getLogger("farsight")

COLUMNS = (
    *(
        "run",
        "checkpoint",
        "documents_from",
        "precision",
        "documents",
        "bytes",
        "words",
        "tokens_scored",
        "nll_nats",
        "loss",
    ),
    *("loss_low", "loss_high", "perplexity", "word_perplexity", "bits_per_byte", "bits_per_byte_low"),
    *("bits_per_byte_high", "protocol", "window", "stride", "min_context", "bos", "tokenizer"),
)
"""Of comparison.csv."""


def compare_checkpoints(config: dict[str, Any]) -> dict[str, Any]:
    """Scores every run that `config["checkpoint"]` lists on the documents of the first (or on `config["data"]`), prints
    the tables and writes them. Returns what comparison.json holds."""
    check_evaluate(config)
    settings = config["evaluation"]
    output = Path(config["output"]) if config["output"] else new_run_path(Path("outputs"), "comparison")
    if output.is_file():
        raise ConfigError(f"output={output}: must be a folder where several runs are compared")
    check_writable(output.parent, config["output"])
    scoring = Scoring(settings["tokens_at_once"], config["precision"], output.parent)
    runs: list[Run] = []
    rows, losses = [], []
    for checkpoint in config["checkpoint"]:
        run = open_run(checkpoint, config["accelerator"], config["precision"])
        check_evaluation(settings, run.sequence_length, run.model.config.max_length)
        if not runs:
            settings = _same_window(settings, run)
            documents, name = open_documents(run, settings["split"], config.get("data"))
        runs.append(run)
        own = retokenize(documents, name, runs[0], run)
        corpus = open_corpus(run) if settings["baselines"] else None
        trained = run.tokenizer, run.sequence_length, corpus
        measured, found = measure(run.model, own, *trained, settings, scoring, run.checkpoint, run.label)
        run.model.to("cpu")
        named = {"run": run.label, "checkpoint": str(run.checkpoint), "documents_from": name}
        rows.append(named | {"precision": config["precision"]} | measured)
        losses.append(found)
    differences = [
        {"run": run.label, "against": runs[0].label}
        | vars(compare(found, losses[0], documents.bytes, same_tokens=same_tokenizer(run, runs[0])))
        for run, found in zip(runs[1:], losses[1:], strict=True)
    ]
    result = {"rows": rows, "differences": differences}
    _write(output, result)
    scoring.finish()
    Console().print(Markdown(_markdown(result)))
    log.info("written to %s", output)
    return result


def _same_window(settings: Mapping[str, Any], first: Run) -> dict[str, Any]:
    """A window of null is as long as a run's training sequences: those of the first run, for all that are compared."""
    protocol = dict(settings["protocol"])
    if protocol["window"] is None and protocol["name"] != "whole":
        protocol["window"] = first.sequence_length
        log.info("evaluation.protocol.window=null: %s's sequences, %s tokens", first.label, protocol["window"])
    return {**settings, "protocol": protocol}


def _write(folder: Path, result: Mapping[str, Any]) -> None:
    from scripts.reporting.pictures import draw_loss_by_position

    make_folder(folder)
    rows = result["rows"]
    write_json(folder / "comparison.json", result)
    lines = io.StringIO()
    writer = csv.DictWriter(lines, COLUMNS, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for row in rows:
        protocol = row["protocol"] | {"protocol": row["protocol"]["name"]}
        writer.writerow(row | protocol | {"tokenizer": _tokenizer(row)})
    write_atomically(folder / "comparison.csv", lines.getvalue())
    write_atomically(folder / "comparison.md", _markdown(result) + "\n![Loss by position](loss_by_position.png)\n")
    draw_loss_by_position(rows, [row["run"] for row in rows], folder / "loss_by_position.png")


def _markdown(result: Mapping[str, Any]) -> str:
    """The tables: the runs, their differences, and the loss by position."""
    rows, first = result["rows"], result["rows"][0]
    protocol = ", ".join(f"{key} {value}" for key, value in first["protocol"].items())
    parts = [
        f"# {len(rows)} runs on the same documents",
        f"{first['documents_from']}: {first['documents']:,} documents, {first['bytes']:,} bytes, {first['words']:,} "
        f"words. Protocol: {protocol}. In brackets: 95 % bounds over documents.",
        table(
            (
                "run",
                "tokenizer",
                "tokens scored",
                "loss (nats/token)",
                "bits per byte",
                "perplexity",
                "word perplexity",
            ),
            [
                (
                    row["run"],
                    _tokenizer(row),
                    f"{row['tokens_scored']:,}",
                    _bounds(row, "loss"),
                    _bounds(row, "bits_per_byte"),
                    f"{row['perplexity']:.2f}",
                    "" if row["word_perplexity"] is None else f"{row['word_perplexity']:,.1f}",
                )
                for row in rows
            ],
        ),
    ]
    if result["differences"]:
        parts += [
            "## Paired difference",
            "Negative: better than the run that it is held against.",
            table(
                ("run", "against", "loss (nats/token)", "bits per byte", "better documents"),
                [
                    (
                        d["run"],
                        d["against"],
                        "other tokens" if d["loss"] is None else _bounds(d, "loss", "+"),
                        _bounds(d, "bits_per_byte", "+"),
                        f"{d['documents_better']} of {d['documents']}",
                    )
                    for d in result["differences"]
                ],
            ),
        ]
    parts += ["## Loss by position (nats/token)", _by_position(rows)]
    return "\n\n".join(parts) + "\n"


def _by_position(rows: Sequence[Mapping[str, Any]]) -> str:
    edges = sorted({(bucket["start"], bucket["stop"]) for row in rows for bucket in row["by_position"]})
    buckets = [{bucket["start"]: bucket for bucket in row["by_position"]} for row in rows]
    lines = []
    for start, stop in edges:
        found = [by_start.get(start) for by_start in buckets]
        cells = ["" if b is None else bounded(b["loss"], b["low"], b["high"]) for b in found]
        lines.append((f"{start:,} to {stop:,}", *cells))
    return table(("tokens", *(row["run"] for row in rows)), lines)


def _tokenizer(row: Mapping[str, Any]) -> str:
    """Its name, and where it was learned from text the first digits of its content's hash."""
    identity = row["tokenizer"]
    return " ".join([identity["tokenizer"], identity.get("content", "")[:8]]).strip()


def _bounds(values: Mapping[str, Any], name: str, sign: str = "") -> str:
    return bounded(values[name], values[f"{name}_low"], values[f"{name}_high"], sign)

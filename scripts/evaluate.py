"""Measures the perplexity and bits per byte of trained models on held-out documents, or their recall.

    python scripts/evaluate.py checkpoint=outputs/window/2026-01-31_12-00-00_000000    a run: its own test split
    python scripts/evaluate.py checkpoint=RUN_DIR/last evaluation.protocol.stride=512
    python scripts/evaluate.py checkpoint=RUN_DIR data=files data.path=books/          other documents
    python scripts/evaluate.py 'checkpoint=[RUN_A,RUN_B]'                              several runs, the same documents
    python scripts/evaluate.py checkpoint=RUN_DIR attention=dense                      also with dense attention
    python scripts/evaluate.py suite=recall checkpoint=RUN_DIR                         recall of distant facts

The result is printed and written to the run's evaluation.json, which has one row for each checkpoint, precision,
protocol and set of documents. A comparison is written to a folder of its own. A command that was killed continues where
it stopped when it is given again.
"""

import sys
from pathlib import Path

if __name__ == "__main__":  # import this repository's packages, not files of this folder or installed namesakes
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import logging
from typing import TYPE_CHECKING, Any

import hydra
from omegaconf import DictConfig

if TYPE_CHECKING:
    from rich.table import Table

    from configs.runs import Run

log = logging.getLogger("farsight")


@hydra.main(version_base="1.3", config_path="../configs", config_name="evaluate")
def main(config: DictConfig) -> None:
    from configs.resolve import resolve_evaluated
    from scripts.console import user_errors

    with user_errors():
        evaluate(resolve_evaluated(config))


def evaluate(config: dict[str, Any]) -> Any:
    """Checks a composed config and runs what it asks for."""
    from configs.checks import check_evaluate

    check_evaluate(config)
    if config["suite"] == "recall":
        return evaluate_recall(config)
    several = isinstance(config["checkpoint"], list) or config.get("attention")
    return (compare_checkpoints if several else evaluate_checkpoint)(config)


def evaluate_checkpoint(config: dict[str, Any]) -> dict[str, Any]:
    """Scores the run that `config["checkpoint"]` names, prints a table, updates evaluation.json. Returns the row."""
    from rich.console import Console

    from configs.evaluation import measure_run
    from configs.group_checks import check_evaluation
    from configs.runs import open_documents, sources_on, units_on
    from configs.series_forecasts import measure_forecasts, open_series, plan_forecasts
    from model.evaluation import Scorer, add_row
    from model.training.run_folder import check_writable
    from scripts.console import progress_bar
    from scripts.reporting.run_table import print_report

    run = _open(config["checkpoint"], config["accelerator"], config["precision"])
    settings = config["evaluation"]
    check_evaluation(settings, run.sequence_length, run.model.config.max_length)
    documents, name = open_documents(run, settings["split"], config.get("data"))
    output = Path(config["output"]) if config["output"] else run.folder / "evaluation.json"
    check_writable(output.parent, config["output"])
    series = open_series(run, config.get("data"))
    forecasts = plan_forecasts(run, series, settings["split"], config["series"]) if series else None
    scorer = Scorer(settings["tokens_at_once"], run.precision, output.parent, progress_bar)
    own = config.get("data")
    measured, _ = measure_run(run, documents, settings, scorer, units_on(run, own), sources_on(run, own))
    if forecasts:
        measured["series_forecasts"] = measure_forecasts(run, series, forecasts, config, progress_bar)
    # The run's own file names a checkpoint relative to the run's folder, which may move.
    absolute = run.checkpoint.absolute()
    row = {
        "checkpoint": str(absolute if config["output"] else absolute.relative_to(run.folder)),
        "documents_from": name,
        "split": None if config.get("data") else settings["split"],
        "precision": run.precision,
    } | measured
    add_row(output, row)
    scorer.finish()
    print_report(Console(), row)
    log.info("written to %s", output)
    return row


def compare_checkpoints(config: dict[str, Any]) -> dict[str, Any]:
    """Scores every run of `config["checkpoint"]` on the same documents: those of the first run, or `config["data"]`.
    With `config["attention"]`, each run is scored under its own attention and under that one. Prints the tables, writes
    them to a folder, and returns the content of comparison.json. A run is compared with the first run, and a run under
    another attention with itself under its own."""
    from rich.console import Console
    from rich.markdown import Markdown

    from configs.errors import ConfigError
    from configs.evaluation import measure_run, shared_settings, under_attention
    from configs.group_checks import check_evaluation
    from configs.runs import open_documents, retokenize, same_tokenizer, sources_on, units_on
    from data.units import BITS
    from model.evaluation import Scorer, compare
    from model.training.run_folder import check_writable, new_run_path
    from scripts.console import progress_bar
    from scripts.reporting.comparison_tables import comparison_markdown, write_comparison

    settings = config["evaluation"]
    output = Path(config["output"]) if config["output"] else new_run_path(Path("outputs"), "comparison")
    if output.is_file():
        raise ConfigError(f"output={output}: must be a folder where runs or attentions are compared")
    check_writable(output.parent, config["output"])
    precision = config["precision"]
    runs: list[Run] = []  # of each row
    rows, losses, against = [], [], []
    named, attention = config["checkpoint"], config.get("attention")
    for checkpoint in named if isinstance(named, list) else [named]:
        run = _open(checkpoint, config["accelerator"], precision)
        check_evaluation(settings, run.sequence_length, run.model.config.max_length)
        models = {run.label: run.model}
        if attention:
            models[f"{run.label} attention={attention['name']}"] = under_attention(run, attention)
        if not runs:
            settings, precision = shared_settings(settings, run), run.precision
            scorer = Scorer(settings["tokens_at_once"], precision, output.parent, progress_bar)
            documents, name = open_documents(run, settings["split"], config.get("data"))
            units, sources = units_on(run, config.get("data")), sources_on(run, config.get("data"))
        own = retokenize(documents, name, runs[0] if runs else run, run)
        for label, model in models.items():
            measured, found = measure_run(run, own, settings, scorer, units, sources, model, label)
            place = {"run": label, "checkpoint": str(run.checkpoint), "documents_from": name}
            changed = {} if model is run.model else {"attention": attention}
            against.append(len(rows) - 1 if changed else 0)
            rows.append(place | changed | {"precision": precision} | measured)
            losses.append(found)
            runs.append(run)
        run.model.to("cpu")
    scored = rows[0]["by_document"]["bytes"]  # of the excerpts, under evaluation.limit
    sizes = scored if BITS in units else [0] * len(scored)
    differences = [
        {"run": rows[row]["run"], "against": rows[other]["run"]}
        | vars(compare(losses[row], losses[other], sizes, same_tokens=same_tokenizer(runs[row], runs[other])))
        for row, other in enumerate(against)
        if row > 0
    ]
    result = {"rows": rows, "differences": differences}
    write_comparison(output, result)
    scorer.finish()
    Console().print(Markdown(comparison_markdown(result)))
    log.info("written to %s", output)
    return result


def _open(checkpoint: str, accelerator: str, precision: str) -> "Run":
    """Opens a run for its evaluation, and logs its device and precision."""
    from configs.group_checks import check_device
    from configs.runs import open_run
    from model.precision import describe_device

    run = open_run(checkpoint, accelerator, precision)
    check_device(accelerator, run.precision)  # that of its training, which this device may lack
    device = {"accelerator": accelerator, "precision": run.precision, "fp8": False, "compile": False}
    log.info("%s is evaluated on: %s", run.label, describe_device(device))
    return run


def evaluate_recall(config: dict[str, Any]) -> list[dict[str, Any]]:
    """Measures the recall of every run that `config["checkpoint"]` names, prints a table, and writes recall.json and a
    picture. The file for the documents of `config["data"]` is recall_<digest>.json. Returns the contents of the
    files."""
    from configs.errors import ConfigError

    named = config["checkpoint"]
    several = isinstance(named, list)
    if several and config["output"]:
        raise ConfigError(f"output={config['output']}: must be null for several runs, each has its own recall.json")
    return [_recall_of(checkpoint, config) for checkpoint in (named if several else [named])]


def _recall_of(checkpoint: str, config: dict[str, Any]) -> dict[str, Any]:
    from rich.console import Console

    from configs.recall import measure_recall, recall_store
    from configs.runs import open_documents
    from model.training.run_folder import check_writable
    from model.training.storage import make_folder, write_json
    from scripts.console import progress_bar
    from scripts.reporting.pictures import draw_recall

    run = _open(checkpoint, config["accelerator"], config["precision"])
    check_writable(Path(config["output"]).parent if config["output"] else run.folder, config["output"])
    documents, name = open_documents(run, config["evaluation"]["split"], config.get("data"))
    store = recall_store(run, documents, config, Path(config["output"]).parent if config["output"] else run.folder)
    result = measure_recall(run, documents, name, config, progress_bar, store)
    which = "" if run.checkpoint.stem == "last" else f"_{run.checkpoint.stem}"  # each checkpoint has its own file
    which += f"_{result['documents_digest'][:8]}" if config.get("data") else ""
    output = Path(config["output"]) if config["output"] else run.folder / f"recall{which}.json"
    make_folder(output.parent)
    write_json(output, result)
    store.delete()
    by_depth = [row for row in result["rows"] if row["depth"] is not None]
    if by_depth:
        folder = output.parent if config["output"] else run.folder / "report"
        draw_recall(by_depth, folder / f"recall_passkey{which}.png")
    Console().print(_recall_table(run.label, result))
    if "retrieval" in result["exact_match"]:
        Console().print(_retrieval_table(run.label, result))
    log.info("written to %s", output)
    return result


def _recall_table(label: str, result: dict[str, Any]) -> "Table":
    from rich.table import Table

    from scripts.reporting.run_table import in_precision

    bar = result["protocol"]["bar"]
    lengths = sorted({row["length"] for row in result["rows"]})
    title = f"{label}: exact answers by length{in_precision(result['protocol']['precision'])}"
    table = Table(title=title, caption=f"effective: the longest length with {bar:.1%}")
    table.add_column("task")
    for column in (*(f"{length:,}" for length in lengths), "effective"):
        table.add_column(column, justify="right")
    for task, shares in result["exact_match"].items():
        cells = [f"{shares[length]:.0%}" if length in shares else "" for length in lengths]
        effective = result["effective_length"][task]
        table.add_row(task, *cells, "none" if effective is None else f"{effective:,}")
    return table


def _retrieval_table(label: str, result: dict[str, Any]) -> "Table":
    """Returns recall@1 by distance: the share of exact answers with its 95 % bounds."""
    from rich.table import Table

    rows = {(row["distance"], row["length"]): row for row in result["rows"] if row["task"] == "retrieval"}
    lengths, distances = (sorted({key[index] for key in rows}) for index in (1, 0))
    title = f"{label}: recall@1 of the document, by length and by distance in tokens"
    table = Table(title=title, caption="with 95 % confidence intervals")
    for column in ("distance", *(f"{length:,}" for length in lengths)):
        table.add_column(column, justify="right")
    for distance in distances:
        found = [rows.get((distance, length)) for length in lengths]
        cells = ["{:.1%} ({:.1%} to {:.1%})".format(r["exact_match"], *r["interval"]) if r else "" for r in found]
        table.add_row(f"{distance:,}", *cells)
    return table


if __name__ == "__main__":
    from scripts.console import run

    run(main)

"""The table that training and scripts/evaluate.py end with."""

from typing import TYPE_CHECKING, Any

from data.units import BITS, LOSS, Units, counted_by, quality_in, short, units_in
from scripts.console import counted

if TYPE_CHECKING:
    from rich.console import Console

    from model.training.run_folder import RunFolder


def print_report(
    console: "Console", row: dict[str, Any], summary: dict[str, Any] | None = None, folder: "RunFolder | None" = None
) -> None:
    """Prints the table of an evaluation; with `summary` and `folder`, that of a run."""
    from rich.table import Table

    title = f"{scored_text(row)}, protocol {row['protocol']['name']}{in_precision(row.get('precision'))}"
    table = Table(title=title, show_header=False)
    table.add_column(style="bold")
    table.add_column(justify="right")
    for name, value in report_rows(row, summary or {}):
        table.add_row(name, value)
    console.print(table)
    if folder:
        console.print(f"run folder: {folder.path}", soft_wrap=True)


def in_precision(precision: str | None) -> str:
    """Returns ", bf16-mixed" for the title of a table; "" for float32, and for early versions, which do not have it."""
    return "" if precision in (None, "32-true") else f", {precision}"


def scored_text(row: dict[str, Any]) -> str:
    """Returns the name and size of the documents of a row of evaluation.json: "test: 7 documents, 455,672 bytes"."""
    documents, limit = counted(row["documents"], "document"), ""
    if whole := row.get("excerpt_of"):
        documents = f"the beginnings of {row['documents']:,} of {counted(whole['documents'], 'document')}"
        limit = f" (evaluation.limit={whole['limit']})"
    return f"{row['documents_from']}: {documents}, {size_of(row)}{limit}"


def size_of(row: dict[str, Any]) -> str:
    """Returns the size of the documents of a row of evaluation.json in its unit: "455,672 bytes", "1,000 values"."""
    quality = quality_in(units_in(row))
    return counted(row["bytes"] if quality == BITS else row["tokens_scored"], counted_by(units_in(row)[quality]))


def report_rows(row: dict[str, Any], summary: dict[str, Any]) -> list[tuple[str, str]]:
    """Returns (name, value) of the table's rows, without those that were not measured."""
    units, baselines, by_source = units_in(row), row.get("baselines", {}), row.get("by_source", {})
    quality, tokens = quality_in(units), f"{counted_by(units[LOSS])}s"
    order = baselines.get("markov_order")
    markov = None if order == 1 else baselines.get(f"markov_{quality}")  # of order 1 it is the bigram model
    cells = [
        ("loss", row["loss"], f"{{:.4f}} {short(units[LOSS])}"),
        (units.get(BITS), row["bits_per_byte"], "{:.4f}"),
        ("  with a lossy tokenizer", row.get("tokenizer", {}).get("lossy"), "{}ed"),
        *(
            (f"  of {name}{_own_unit(found, units, quality)}", found[quality], "{:.4f}")
            for name, found in by_source.items()
        ),
        ("  gzip -9, per document", baselines.get(f"gzip_{quality}"), "{:.4f}"),
        (f"  bigram model, same {tokens}", baselines.get(f"bigram_{quality}"), "{:.4f}"),
        (f"  Markov model of order {order}", markov, "{:.4f}"),
        ("perplexity", row["perplexity"], "{:.2f}"),
        ("perplexity per word", row["word_perplexity"], "{:,.1f}"),
        (f"loss of a document's first 512 {tokens}", row["loss_first_512"], "{:.4f}"),
        ("loss of a document's last quarter", row["loss_last_quarter"], "{:.4f}"),
        (f"loss of a document's last 2,048 {tokens}", (row["trailing"] or {}).get("loss"), "{:.4f}"),
        *(
            (f"loss of the same {tokens}, {_given(c['context'])}", c["loss"], "{:.4f}")
            for c in row.get("by_context", [])
        ),
        ("perplexity on key tokens (LongPPL)", row.get("key_tokens", {}).get("perplexity"), "{:.2f}"),
        *_forecast_cells(row.get("series_forecasts")),
        ("training speed", summary.get("tokens_per_second"), "{:,.0f} tokens/s"),
        ("attention density, pairs", summary.get("density_pairs"), "{:.1%}"),
        ("attention density, tiles", summary.get("density_tiles"), "{:.1%}"),
        ("peak memory", _peak(summary), "{}"),
        ("parameters", summary.get("parameters"), "{:,}"),
        ("trained on", summary.get("train_tokens"), "{:,} tokens"),
        ("training time", summary.get("train_seconds"), "{:,.0f} s"),
    ]
    return [(name, form.format(value)) for name, value, form in cells if value is not None]


def _own_unit(found: dict[str, Any], units: Units, quality: str) -> str:
    """Returns ", bits per base" for a source of a mixture whose quality has another unit than that of all."""
    own = found.get("units", units)[quality]  # early versions do not have it
    return "" if own == units[quality] else f", {own}"


def _given(context: int | str) -> str:
    return f"{context:,} before them" if isinstance(context, int) else "all before them"


def _forecast_cells(forecasts: dict[str, Any] | None) -> list[tuple[str, str, str]]:
    if forecasts is None:
        return []
    of = "{series} series, every {stride} rows, {context} values before, median of {samples} samples".format(
        **forecasts
    )
    cells = [("forecasts", of, "{}")]
    for found in forecasts["horizons"]:
        name = f"  {found['horizon']} values ahead, {found['forecasts']:,} forecasts"
        cells.append((name, "MSE {mse:.4f}, MAE {mae:.4f}".format(**found), "{}"))
        naive = "MSE {seasonal_naive_mse:.4f}, MAE {seasonal_naive_mae:.4f}".format(**found)
        cells.append((f"    seasonal naive, period {forecasts['period']}", naive, "{}"))
    return cells


def _peak(summary: dict[str, Any]) -> str | None:
    measured, forecast = summary.get("peak_memory_bytes"), summary.get("forecast", {}).get("peak_memory_bytes")
    if measured is None:
        return None
    return f"{measured / 1e9:.2f} GB" + (f" (forecast {forecast / 1e9:.2f})" if forecast else "")

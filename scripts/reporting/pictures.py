"""Draws the images of a run: the masks of its patterns, loss by position, and recall by depth."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.ticker import LogLocator

from data.units import LOSS, counted_by, short, units_in
from kernels import Axis
from kernels.patterns import Pattern
from model.attention import DrawableLayout, build_attention_layout
from model.training.storage import make_folder, write_atomically

SHADES = LinearSegmentedColormap.from_list("seen", ["#f4f1ea", "#1f4e79"])
COLUMNS = 5
LONGEST = 8192
"""Longest document that is drawn, in tokens. Its mask is dense, and an image has fewer pixels anyway."""


def draw_patterns(
    patterns: Mapping[str, Pattern], length: int, file: Path, block: int = 128, zoom: int | None = None
) -> None:
    """Writes a PNG with the mask of each pattern over one document of `length` tokens (at most LONGEST).

    Panels have at most 512 x 512 cells; the shade of a cell is the fraction of its pairs that are visible. Tokens that
    are visible through a summary are lighter, in proportion to the tokens of the summary.

    Args:
        zoom: adds a second panel for each pattern, with so many last tokens.
    """
    length = min(length, LONGEST)
    parts = [None] if zoom is None or zoom >= length else [None, zoom]
    columns = min(COLUMNS, len(patterns))
    rows = -(-len(patterns) // columns) * len(parts)
    figure, panels = plt.subplots(rows, columns, figsize=(2.2 * columns, 2.5 * rows), squeeze=False)
    for panel in panels.flat:
        panel.axis("off")
    for index, (name, pattern) in enumerate(patterns.items()):
        layout = build_attention_layout(pattern, Axis.tokens(length), block)
        density = layout.cost(batch=1, heads=1, head_dim=1).density_pairs
        for number, last in enumerate(parts):
            panel = panels[index // columns * len(parts) + number][index % columns]
            panel.axis("on")
            panel.imshow(_shades(layout, 512, last), cmap=SHADES, interpolation="nearest", vmin=0, vmax=1)
            panel.set_title(name, fontsize=10)
            caption = f"{density:.0%} of dense, {length:,} tokens" if last is None else f"the last {last:,} tokens"
            panel.set_xlabel(caption, fontsize=8)
            panel.set_xticks([])
            panel.set_yticks([])
    panels[0][0].set_ylabel("queries", fontsize=8)
    _save(figure, file)


def draw_loss_by_position(rows: Sequence[Mapping[str, Any]], labels: Sequence[str], file: Path) -> None:
    """Writes a PNG of loss against position in the document, a line for each row of evaluation.json."""
    figure, axes = plt.subplots(figsize=(6, 3.6))
    for row, label in zip(rows, labels, strict=True):
        plot_loss_by_position(axes, row["by_position"], units_in(row)[LOSS], label=label)
    if any(bucket["low"] is not None for row in rows for bucket in row["by_position"]):
        axes.set_title("shaded: 95 % interval over documents", fontsize=8)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    _save(figure, file)


def plot_loss_by_position(axes: plt.Axes, buckets: Sequence[Mapping[str, float]], unit: str, **line: Any) -> None:
    """Draws `by_position` of a row of evaluation.json, with a band where it has bounds. `unit`: that of its losses.
    `line`: keywords of plot."""
    middle = [(b["start"] + b["stop"]) / 2 for b in buckets]
    (drawn,) = axes.plot(middle, [b["loss"] for b in buckets], **{"marker": "o", "markersize": 4} | line)
    low, high = (np.array([b[bound] for b in buckets], dtype=float) for bound in ("low", "high"))  # None becomes NaN
    axes.fill_between(middle, low, high, color=drawn.get_color(), alpha=0.15, linewidth=0)
    axes.set_xscale("log", base=2)
    span = axes.dataLim.x1 / axes.dataLim.x0 if axes.dataLim.x0 > 0 else 1.0
    axes.xaxis.set_major_locator(
        LogLocator(base=2 if span <= 32 else 4 if span <= 512 else 16)
    )  # more labels would touch
    axes.xaxis.set_major_formatter(lambda position, _: f"{position:,.0f}")
    axes.set_xlabel(f"position in the document ({counted_by(unit)}s)")
    axes.set_ylabel(f"loss ({short(unit)})")
    _cut_wide_bands(axes)


def _cut_wide_bands(axes: plt.Axes) -> None:
    """Cuts off bands that would flatten every line, as those over two documents do."""
    losses = np.concatenate([line.get_ydata() for line in axes.lines])
    span = np.ptp(losses)
    if span:
        low, high = max(axes.dataLim.y0, losses.min() - span), min(axes.dataLim.y1, losses.max() + span)
        axes.set_ylim(low - 0.05 * span, high + 0.05 * span)


def draw_recall(rows: Sequence[Mapping[str, Any]], file: Path) -> None:
    """Writes a PNG of exact match by depth and length, from rows of recall.json with a depth."""
    lengths, depths = (sorted({row[key] for row in rows}) for key in ("length", "depth"))
    share = np.full((len(depths), len(lengths)), np.nan)
    for row in rows:
        share[depths.index(row["depth"]), lengths.index(row["length"])] = row["exact_match"]
    figure, axes = plt.subplots(figsize=(1.6 + 0.9 * len(lengths), 1.4 + 0.5 * len(depths)))
    picture = axes.imshow(share, cmap="RdYlGn", vmin=0, vmax=1, aspect="auto")
    for (depth, length), value in np.ndenumerate(share):
        axes.text(length, depth, f"{value:.0%}", ha="center", va="center", fontsize=8)
    axes.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths])
    axes.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths])
    axes.set_xlabel("length (tokens)")
    axes.set_ylabel("depth of the pass key")
    figure.colorbar(picture, label="exact match")
    _save(figure, file)


def draw_probe(result: Mapping[str, Any], file: Path) -> None:
    """Writes a PNG of the content of probe.json: the loss change of each layer or KV head, in total and by position,
    and its attention by distance."""
    units = result["units"]
    names = [unit_name(row) for row in units]
    height = max(3.0, 1.4 + 0.22 * len(units))
    figure, panels = plt.subplots(1, 3, figsize=(13, height), sharey=True, width_ratios=(1, 1, 1.6))
    rows = np.arange(len(units))
    change = np.array([row["change"] for row in units])
    bounds = np.array([[row["low"], row["high"]] for row in units], dtype=float).T  # None becomes NaN
    panels[0].barh(rows, change, xerr=np.abs(bounds - change), color="#1f4e79", error_kw={"ecolor": "#888888"})
    panels[0].axvline(0, color="black", linewidth=0.8)
    panels[0].set_title(f"loss change{' with 95 % bounds' * (not np.isnan(bounds).any())}", fontsize=9)
    panels[0].set_xlabel(f"loss change ({short(result['loss_unit'])})")
    panels[0].locator_params(axis="x", nbins=4)
    panels[0].set_ylabel("changed layer" if units[0]["head"] is None else "changed layer.head")
    panels[0].set_yticks(rows, names)
    panels[0].invert_yaxis()

    by_position = np.array([[each["change"] for each in row["by_position"]] for row in units])
    largest = float(np.abs(by_position).max()) or 1.0
    heat = panels[1].imshow(by_position, cmap="RdBu_r", vmin=-largest, vmax=largest, aspect="auto")
    starts = [each["start"] for each in units[0]["by_position"]]
    panels[1].set_xticks(range(len(starts)), [f"{start:,}" for start in starts], rotation=45)
    panels[1].set_title("loss change by position", fontsize=9)
    panels[1].set_xlabel("first position (tokens)")
    figure.colorbar(heat, label=f"loss change ({short(result['loss_unit'])})")

    heat = panels[2].imshow([row["mass"] for row in units], cmap=SHADES, vmin=0, aspect="auto")
    starts = result["mass_edges"][:-1]
    panels[2].set_xticks(range(len(starts)), [f"{start:,}" for start in starts], rotation=45)
    panels[2].axvline(starts.index(result["near"]) - 0.5, color="#c0392b", linewidth=1)
    panels[2].set_title("attention by distance; red line: the end of the window", fontsize=9)
    panels[2].set_xlabel("shortest distance (tokens)")
    figure.colorbar(heat, label="share of dense attention")
    _save(figure, file)


def unit_name(row: Mapping[str, Any]) -> str:
    """Returns the name of a layer, or of a KV head as layer.head, from its row of probe.json."""
    return str(row["layer"]) if row["head"] is None else f"{row['layer']}.{row['head']}"


def _shades(layout: DrawableLayout, cells: int, last: int | None = None) -> np.ndarray:
    return sum(
        shade * _shrink(mask.numpy()[-(last or 0) :, -(last or 0) :], cells) for mask, shade in layout.token_masks()
    )


def _shrink(mask: np.ndarray, cells: int) -> np.ndarray:
    step = -(-len(mask) // cells)
    padding = -len(mask) % step
    mask = np.pad(mask, ((0, padding), (0, padding)))
    rows = mask.reshape(len(mask) // step, step, -1).sum(1, dtype=np.int16)  # four times as fast as both sums at once
    return rows.reshape(len(rows), -1, step).mean(2) / step


def _save(figure: plt.Figure, file: Path) -> None:
    figure.tight_layout()
    picture = io.BytesIO()
    figure.savefig(picture, dpi=130, format=file.suffix[1:] or "png")
    plt.close(figure)
    make_folder(file.parent)
    write_atomically(file, picture.getvalue())

"""Draws the figures: quality against each cost, training loss, and loss by position.

Each function draws one panel on given axes. The page shows single panels as SVG in its own colours; PNG and SVG files
show several. The same inputs give the same bytes.
"""

import io
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import NullLocator

from data.units import counted_by, short
from scripts.reporting.aggregate import COSTS, Row, quality_of, unit_of_quality
from scripts.reporting.curves import Curve
from scripts.reporting.labels import Point, literal, place_labels
from scripts.reporting.pictures import plot_loss_by_position
from scripts.reporting.style import LIGHT, Style, follow_css
from scripts.reporting.table import unit_of

Draw = Callable[[Axes], "Callable[[], None] | None"]
"""Draws a panel. May return a function that places labels, called after the figure's layout is final."""

COST_AXES = {
    "step_seconds": ("seconds", "step time"),
    "attention_flops_per_token": ("flops", "attention FLOPs per token"),
    "peak_memory_bytes": ("bytes", "peak memory"),
}
MOST_NAMED_POINTS = 16
"""Largest number of points that are labelled by name; more are labelled by their number in the table."""

PANEL = (4.7, 3.7)  # inches; a point of text is about a pixel on a phone
SETTINGS = {
    "font.size": 9.5,
    "axes.edgecolor": LIGHT["front"],
    "axes.labelcolor": LIGHT["soft"],
    "axes.titlesize": 10,
    "axes.titlecolor": LIGHT["ink"],
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.facecolor": "none",
    "axes.grid": True,
    "grid.color": LIGHT["line"],
    "grid.linewidth": 0.6,
    "xtick.color": LIGHT["front"],
    "ytick.color": LIGHT["front"],
    "xtick.labelcolor": LIGHT["soft"],
    "ytick.labelcolor": LIGHT["soft"],
    "text.color": LIGHT["ink"],
    "legend.frameon": False,
    "svg.fonttype": "none",  # keeps text for screen readers, in the page's font
    "axes.unicode_minus": True,
}


def draw_cost(axes: Axes, rows: Sequence[Row], styles: Sequence[Style], cost: str) -> Callable[[], None] | None:
    """Draws the quality against `cost`, with intervals over seeds, lines through dense, and the Pareto front."""
    kind, title = COST_AXES[cost]
    quality = quality_of(rows)
    shown = [
        (row, style, number)
        for number, (row, style) in enumerate(zip(rows, styles, strict=True), 1)
        if cost in row.values and quality in row.values
    ]
    size, unit = unit_of(kind, max((row.values[cost].mean for row, _, _ in shown), default=0.0))
    axes.set_xlabel(f"{title} ({unit})")
    axes.set_ylabel(f"held-out {unit_of_quality(rows)}")
    if not shown:
        _write_notice(axes, "no finished job yet")
        return None
    points = [(row.values[cost].mean / size, row.values[quality].mean) for row, _, _ in shown]
    xs = [x for x, _ in points]
    if min(xs) > 0 and max(xs) / min(xs) > 8:
        axes.set_xscale("log")
        _plain_log_ticks(axes, min(xs), max(xs))
    for (row, style, _), (x, y) in zip(shown, points, strict=True):
        if row.baseline or row.is_control:
            dots = {"color": LIGHT["front"], "linewidth": 0.8, "linestyle": (0, (1, 3)), "zorder": 1}
            axes.axhline(y, **dots | ({"linestyle": (0, (5, 3))} if row.is_control else {}))
            if row.baseline:
                axes.axvline(x, **dots)
        half_x, half_y = ((row.values[name].half_width or 0.0) / scale for name, scale in ((cost, size), (quality, 1)))
        error = {"ecolor": style.color, "elinewidth": 1.1, "capsize": 2.5, "alpha": 0.75, "zorder": 2}
        axes.errorbar([x], [y], xerr=half_x or None, yerr=half_y or None, fmt="none", **error)
        point = {"markersize": 7.5, "zorder": 4, "markeredgecolor": LIGHT["paper"], "markeredgewidth": 0.9}
        axes.plot([x], [y], style.marker, color=style.color, **point)
    _frame(axes, points)
    front = [point for (row, _, _), point in zip(shown, points, strict=True) if cost in row.fronts]
    _draw_front(axes, sorted(front))
    names = [row.label if len(rows) <= MOST_NAMED_POINTS else str(number) for row, _, number in shown]
    return partial(place_labels, axes, points, names)


def draw_curves(axes: Axes, curves: Sequence[Curve | None], styles: Sequence[Style], along: str, label: str) -> None:
    """Draws `curves` (None for rows without one) along "tokens" or "seconds"."""
    drawn = [(curve, style) for curve, style in zip(curves, styles, strict=True) if curve is not None]
    kind, title = {"tokens": ("tokens", "tokens trained on"), "seconds": ("time", "training time")}[along]
    axes.set_ylabel(label)
    if not drawn:
        axes.set_xlabel(title)
        return _write_notice(axes, "nothing logged yet")
    largest = max(curve.along(along)[-1] for curve, _ in drawn)
    if kind == "tokens":
        size, unit = unit_of(kind, largest)
        axes.set_xlabel(f"{title} ({unit or 'tokens'})")
    else:
        size, unit = next(((s, u) for s, u in ((3600.0, "h"), (60.0, "min")) if largest >= 2 * s), (1.0, "s"))
        axes.set_xlabel(f"{title} ({unit})")
    for curve, style in drawn:
        few = len(curve.values) < 12
        axes.plot([x / size for x in curve.along(along)], curve.values, color=style.color, linewidth=1.5,
                  linestyle=style.linestyle, alpha=1 if curve.finished else 0.6,
                  marker=style.marker if few else "", markersize=4.5)  # fmt: skip
    # The first steps' high losses would hide the differences between runs.
    early = max(curve.values[min(len(curve.values) - 1, len(curve.values) // 8)] for curve, _ in drawn)
    lowest = min(min(curve.values) for curve, _ in drawn)
    if early > lowest:
        axes.set_ylim(lowest - 0.05 * (early - lowest), early + 0.05 * (early - lowest))


def draw_positions(
    axes: Axes, positions: Sequence[Sequence[Mapping[str, float]]], styles: Sequence[Style], unit: str
) -> None:
    """Draws every row's loss by position, with its band. `unit`: that of losses."""
    for buckets, style in zip(positions, styles, strict=True):
        if buckets:
            plot_loss_by_position(axes, buckets, unit, color=style.color, marker=style.marker, markersize=4.5,
                                  linewidth=1.4, linestyle=style.linestyle)  # fmt: skip
    for band in axes.collections:
        band.set_alpha(0.4 / (2 + len(axes.collections)))
    if not any(positions):
        _write_notice(axes, "no evaluation yet")


def draw_contexts(
    axes: Axes, contexts: Sequence[Sequence[Mapping[str, float]]], styles: Sequence[Style], unit: str
) -> None:
    """Draws every row's loss of the same tokens by the amount of context. Its bounds over documents would hide the
    differences: all rows have the same documents, which differ more than the rows do."""
    _draw_at(axes, [[(c["context"], *[c["loss"]] * 3) for c in each] for each in contexts], styles, unit)


def draw_gains(
    axes: Axes, contexts: Sequence[Sequence[Mapping[str, float]]], styles: Sequence[Style], unit: str
) -> None:
    """Draws how much of the loss each context saves every row beside its shortest one, with the paired interval."""
    keys = ("context", "gain", "gain_low", "gain_high")
    points = []
    for each in contexts:
        gains = [tuple(c.get(key) for key in keys) for c in each if "gain" in c]
        points.append([(each[0]["context"], 0.0, 0.0, 0.0), *gains] if gains else [])
    _draw_at(axes, points, styles, unit)
    axes.axhline(0, color=LIGHT["ink"], linewidth=1.0)
    axes.set_ylabel(f"saved by context ({short(unit)})")


def _draw_at(
    axes: Axes, points: Sequence[Sequence[tuple[float, float, float, float]]], styles: Sequence[Style], unit: str
) -> None:
    """Draws (context, value, low, high) of every row: as positions, of buckets that begin and end at the context."""
    keys = ("start", "stop", "loss", "low", "high")
    draw_positions(axes, [[dict(zip(keys, (p[0], *p), strict=True)) for p in each] for each in points], styles, unit)
    axes.set_xlabel(f"context ({counted_by(unit)}s)")


def draw_position_differences(
    axes: Axes, differences: Sequence[Sequence[Mapping[str, float]]], styles: Sequence[Style], unit: str
) -> None:
    """Draws the difference to dense by position in the document."""
    draw_positions(axes, differences, styles, unit)
    axes.axhline(0, color=LIGHT["ink"], linewidth=1.0)
    losses = [0.0, *(bucket["loss"] for buckets in differences for bucket in buckets)]
    bounds = [bucket[key] for buckets in differences for bucket in buckets for key in ("low", "high")]
    shown = [*losses, *(bound for bound in bounds if bound is not None)]
    span = max(losses) - min(losses)
    if span:  # wide intervals, as of two seeds, are cut off; they would flatten every line
        low, high = max(min(shown), min(losses) - span), min(max(shown), max(losses) + span)
        axes.set_ylim(low - 0.05 * span, high + 0.05 * span)
    axes.set_ylabel(f"loss minus dense's ({short(unit)})")


def to_inline_svg(draw: Draw, name: str) -> str:
    """Returns a panel as an <svg> element in the page's colours. `name` makes its ids unique in the page."""
    with plt.rc_context(SETTINGS | {"svg.hashsalt": name}):
        figure = Figure(figsize=PANEL, layout="constrained", facecolor="none")
        FigureCanvasAgg(figure)
        _compose(figure, [(draw, figure.add_subplot())])
        text = _svg(figure)
    svg = text[text.index("<svg ") :]
    head, _, body = svg.partition(">")
    box = next(part for part in head.split('" ') if part.startswith("viewBox="))
    body = body[body.index("<defs>") :]  # without metadata
    return follow_css(f'<svg {box}" xmlns="http://www.w3.org/2000/svg" aria-hidden="true" focusable="false">{body}')


def to_files(
    panels: Sequence[Draw], name: str, rows: Sequence[Row], styles: Sequence[Style], pdf: bool = False
) -> dict[str, bytes]:
    """Returns {"name.png": ..., "name.svg": ...} of the panels side by side, with a legend below; also "name.pdf"."""
    columns = min(3, len(panels)) if len(panels) != 4 else 2
    lines = -(-len(panels) // columns)
    width = PANEL[0] * columns
    names = [literal(name) for name in legend_names(rows)]
    beside = max(1, int(width / (0.7 + 0.085 * max(map(len, names), default=0))))  # columns of the legend that fit
    size = width, PANEL[1] * lines + 0.24 * -(-len(names) // beside)
    with plt.rc_context(SETTINGS | {"svg.hashsalt": name}):
        figure = Figure(figsize=size, layout="constrained", facecolor=LIGHT["paper"])
        FigureCanvasAgg(figure)
        handles = [
            Line2D([], [], color=style.color, marker=style.marker, linestyle=style.linestyle, label=label)
            for style, label in zip(styles, names, strict=True)
        ]
        if handles:
            figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), beside))
        _compose(figure, [(draw, figure.add_subplot(lines, columns, n)) for n, draw in enumerate(panels, 1)])
        picture = io.BytesIO()
        figure.savefig(picture, format="png", dpi=130, metadata={"Software": None})
        files = {f"{name}.png": picture.getvalue(), f"{name}.svg": _svg(figure).encode()}
        if pdf:
            page = io.BytesIO()
            figure.savefig(page, format="pdf", metadata={"CreationDate": None, "Producer": None, "Creator": None})
            files[f"{name}.pdf"] = page.getvalue()
        return files


def legend_names(rows: Sequence[Row]) -> list[str]:
    """Returns the rows' labels, with their numbers if points are labelled by number."""
    if len(rows) <= MOST_NAMED_POINTS:
        return [row.label for row in rows]
    return [f"{number} {row.label}" for number, row in enumerate(rows, 1)]


def cost_panels(rows: Sequence[Row], styles: Sequence[Style]) -> dict[str, Draw]:
    """Returns a panel for each cost that a row has. Before the first result, all costs have an empty panel."""
    known = [cost for cost in COSTS if any(cost in row.values for row in rows)]
    return {cost: partial(draw_cost, rows=rows, styles=styles, cost=cost) for cost in known or COSTS}


def _compose(figure: Figure, panels: Sequence[tuple[Draw, Axes]]) -> None:
    later = [draw(axes) for draw, axes in panels]
    figure.canvas.draw()
    figure.set_layout_engine("none")  # keeps the current layout
    for finish in later:
        if finish is not None:
            finish()


def _svg(figure: Figure) -> str:
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    return text.getvalue()


def _frame(axes: Axes, points: Sequence[Point]) -> None:
    """Leaves room for labels around the points and their bars.

    Shows intervals of quality in full, and cuts off long intervals of a cost, which may be negative with two seeds.
    """
    axes.margins(x=0.18, y=0.16)
    axes.autoscale_view()
    xs = [x for x, _ in points]
    room = max(max(xs) - min(xs), 0.15 * max(xs))
    left, right = axes.get_xlim()
    if axes.get_xscale() == "linear":
        axes.set_xlim(max(left, min(xs) - room, 0.0), min(right, max(xs) + room))
    else:
        axes.set_xlim(max(left, min(xs) / 2), min(right, max(xs) * 2))
    if len(points) == 1:
        axes.locator_params(axis="y", nbins=4)


def _draw_front(axes: Axes, front: Sequence[Point]) -> None:
    """Draws the best quality within a cost, as steps."""
    limits = axes.get_xlim(), axes.get_ylim()
    corners = [(front[0][0], limits[1][1])]
    for x, y in front:
        corners += [(x, corners[-1][1]), (x, y)]
    corners.append((limits[0][1], front[-1][1]))
    axes.plot(*zip(*corners, strict=True), color=LIGHT["front"], linewidth=1.3, zorder=1.5)
    axes.set(xlim=limits[0], ylim=limits[1])


def _plain_log_ticks(axes: Axes, low: float, high: float) -> None:
    """Sets few ticks without exponents: 20, 50, 100."""
    ticks = [base * 10.0**power for power in range(-9, 16) for base in (1, 2, 5)]
    axes.set_xticks([tick for tick in ticks if low / 1.5 <= tick <= high * 1.5])
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.10g}")
    axes.xaxis.set_minor_locator(NullLocator())


def _write_notice(axes: Axes, text: str) -> None:
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", color=LIGHT["soft"])
    axes.set_xticks([])
    axes.set_yticks([])

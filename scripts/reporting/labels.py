"""Places names beside points with adjustText."""

from collections.abc import Sequence

from adjustText import adjust_text
from matplotlib.axes import Axes

from scripts.reporting.style import LIGHT

Point = tuple[float, float]


def place_labels(axes: Axes, points: Sequence[Point], names: Sequence[str]) -> None:
    """Writes `names` beside `points` without overlaps. A line connects a name with a distant point. Behind a name, a
    front or a bar that it crosses is hidden."""
    behind = {"facecolor": LIGHT["paper"], "edgecolor": "none", "pad": 0.3, "alpha": 0.8}
    texts = [
        axes.text(x, y, literal(name), fontsize=8.5, zorder=3, bbox=behind)
        for (x, y), name in zip(points, names, strict=True)
    ]
    xs, ys = zip(*points, strict=True)
    adjust_text(
        texts, xs, ys, ax=axes, expand=(1.15, 1.5), ensure_inside_axes=True, iter_lim=300,
        arrowprops={"arrowstyle": "-", "color": LIGHT["front"], "linewidth": 0.6, "shrinkB": 4},
    )  # fmt: skip


def literal(text: str) -> str:
    """Escapes what matplotlib interprets: $...$ as mathematics, and a leading _ that hides a legend's label."""
    text = text.replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text

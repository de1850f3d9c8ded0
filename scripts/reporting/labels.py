"""Names beside points: no two overlap, and whoever had to go far is tied to its point."""

import itertools
import math
from collections.abc import Iterator, Sequence

from matplotlib.axes import Axes
from matplotlib.transforms import Bbox

from scripts.reporting.style import LIGHT

Point = tuple[float, float]


def place_labels(
    axes: Axes, points: Sequence[Point], names: Sequence[str], bars: Sequence[tuple[Point, Point]] = ()
) -> None:
    """Writes `names` beside `points` so that none overlaps another, a point, one of the `bars` (from, to), or the
    frame; a name that had to go far is tied to its point by a line. Nearest places are tried first, and the points in
    the largest crowd choose first."""
    figure = axes.figure
    renderer, to_pixels = figure.canvas.get_renderer(), figure.dpi / 72
    centres = [axes.transData.transform(point) for point in points]
    frame = axes.get_window_extent(renderer)
    mark = 5.5 * to_pixels
    ends = [axes.transData.transform(bar) for bar in bars]
    taken = [Bbox([start - 1, stop + 1]) for start, stop in ends]
    taken += [Bbox.from_bounds(x - mark, y - mark, 2 * mark, 2 * mark) for x, y in centres]

    def crowd(index: int) -> float:
        return sum(1 / (1 + math.dist(centres[index], other)) for other in centres)

    for index in sorted(range(len(points)), key=lambda i: (-crowd(i), i)):
        x, y = centres[index]
        where = {"xytext": (0, 0), "textcoords": "offset points", "ha": "left", "va": "center"}
        text = axes.annotate(literal(names[index]), points[index], fontsize=8.5, zorder=5, **where)
        extent = text.get_window_extent(renderer)
        width, height = extent.width + 2 * to_pixels, extent.height
        for distance, angle in _places():
            dx, dy = distance * math.cos(angle) * to_pixels, distance * math.sin(angle) * to_pixels
            left = x + dx - width * (0.5 - 0.5 * math.cos(angle))
            box = Bbox.from_bounds(left, y + dy - height * (0.5 - 0.5 * math.sin(angle)), width, height)
            inside = frame.x0 <= box.x0 and box.x1 <= figure.bbox.x1 and frame.y0 <= box.y0 and box.y1 <= figure.bbox.y1
            if inside and not any(_overlap(box, other) for other in taken):
                break
        else:
            text.remove()  # nowhere left: the table and the mark still say which it is
            continue
        taken.append(box)
        text.set_position(((left - x) / to_pixels + 1, (box.y0 + box.height / 2 - y) / to_pixels))
        if distance > 16:
            end = (min(max(x, box.x0), box.x1), min(max(y, box.y0), box.y1))
            axes.annotate("", points[index], xytext=axes.transData.inverted().transform(end), textcoords="data",
                          arrowprops=dict(arrowstyle="-", color=LIGHT["front"], linewidth=0.6, shrinkA=0, shrinkB=4),
                          zorder=3)  # fmt: skip


def _places() -> Iterator[tuple[float, float]]:
    """(distance in points, angle): beside the point first, then around it, ever further."""
    around = [0, math.pi, math.pi / 2, -math.pi / 2, *(k * math.pi / 8 for k in range(16) if k % 4)]
    return itertools.product((8, 11, 16, 22, 30, 40, 52, 66, 82, 100), around)


def _overlap(one: Bbox, other: Bbox) -> bool:
    return one.x0 < other.x1 and other.x0 < one.x1 and one.y0 < other.y1 and other.y0 < one.y1


def literal(text: str) -> str:
    """matplotlib reads $...$ as mathematics, and hides a legend's label that begins with _."""
    text = text.replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text

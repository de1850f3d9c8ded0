"""Colours, markers and dashes of patterns, the same in every figure and in the page.

Figures use the light colours. The page replaces each colour of their SVG by a CSS variable, which has another value in
the dark scheme; so every role needs a unique colour. The eight hues are distinguishable with the common kinds of
colour blindness: they maximize the smallest distance, which tests check. Markers and, from the ninth pattern, dashes
distinguish patterns without colour.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from scripts.reporting.aggregate import Row

LIGHT = {
    "ink": "#1b2430",
    "soft": "#5b6675",
    "line": "#d5dae1",
    "paper": "#fffffe",
    "front": "#8a94a3",
    "c0": "#3d8efc",
    "c1": "#c88600",
    "c2": "#7f9b69",
    "c3": "#900ca2",
    "c4": "#9d3700",
    "c5": "#a577ad",
    "c6": "#3822e5",
    "c7": "#461b00",
}
DARK = {
    "ink": "#e7ebf0",
    "soft": "#a3adba",
    "line": "#39424e",
    "paper": "#171c22",
    "front": "#7d8896",
    "c0": "#0aa6ff",
    "c1": "#ffc935",
    "c2": "#acffb5",
    "c3": "#d0405e",
    "c4": "#915d00",
    "c5": "#9179a8",
    "c6": "#5154e9",
    "c7": "#ff9063",
}
HUES = 8
DASHES: tuple[tuple[float, ...] | None, ...] = (None, (4, 1.6), (1.2, 1.2), (5, 1.4, 1.2, 1.4))

MARKS: tuple[tuple[str, str], ...] = (
    ("o", "M12 2.2a3.8 3.8 0 1 0 0 7.6a3.8 3.8 0 1 0 0-7.6z"),
    ("s", "M8.6 2.6h6.8v6.8h-6.8z"),
    ("^", "M12 1.6l4.4 8h-8.8z"),
    ("P", "M10.6 1.8h2.8v2.8h2.8v2.8h-2.8v2.8h-2.8v-2.8h-2.8v-2.8h2.8z"),
    ("v", "M12 10.4l4.4-8h-8.8z"),
    ("p", "M12 1.6l4.4 3.2l-1.7 5.2h-5.4l-1.7-5.2z"),
    ("X", "M9.6 1.6l2.4 2.4l2.4-2.4l2 2l-2.4 2.4l2.4 2.4l-2 2l-2.4-2.4l-2.4 2.4l-2-2l2.4-2.4l-2.4-2.4z"),
    ("h", "M12 1.4l4 2.3v4.6l-4 2.3l-4-2.3v-4.6z"),
)
"""(matplotlib's marker, its SVG path in a box of 24 x 12) of each hue."""
BASELINE_MARK = ("D", "M12 1.2l4.8 4.8l-4.8 4.8l-4.8-4.8z")


@dataclass(frozen=True)
class Style:
    """The colour, marker and line of a row."""

    role: str  # of LIGHT and DARK
    marker: str  # matplotlib's
    path: str  # the marker as SVG
    dash: tuple[float, ...] | None  # lengths of a dashed line in line widths; None: solid

    @property
    def color(self) -> str:
        return LIGHT[self.role]

    @property
    def linestyle(self) -> str | tuple[int, tuple[float, ...]]:
        return "-" if self.dash is None else (0, self.dash)


def make_styles(rows: Sequence[Row]) -> list[Style]:
    """Returns a style for each row: baselines in the colour of text, the others in turn in the hues."""
    return styles_of([row.baseline for row in rows])


def styles_of(are_baselines: Sequence[bool]) -> list[Style]:
    """Returns a style for each pattern, given which are baselines."""
    styles, patterns, baselines = [], 0, 0
    for is_baseline in are_baselines:
        if is_baseline:
            styles.append(Style("ink", *BASELINE_MARK, DASHES[baselines % len(DASHES)]))
            baselines += 1
        else:
            turn, hue = divmod(patterns, HUES)
            styles.append(Style(f"c{hue}", *MARKS[(hue + 3 * turn) % HUES], DASHES[turn % len(DASHES)]))
            patterns += 1
    return styles


def css_variables(colors: dict[str, str]) -> str:
    """Returns `--ink:#1b2430;...`."""
    return "".join(f"--{role}:{color};" for role, color in colors.items())


def follow_css(svg: str) -> str:
    """Replaces the colours of LIGHT in an SVG by the page's variables."""
    for role, color in LIGHT.items():
        svg = svg.replace(color, f"var(--{role})")
    return svg

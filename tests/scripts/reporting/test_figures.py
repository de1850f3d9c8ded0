"""Labels that do not overlap, colours that belong to a pattern, and text that stays text."""

import itertools
import random
import re

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from scripts.reporting.aggregate import make_rows
from scripts.reporting.figures import cost_panels, place_labels, to_inline_svg
from scripts.reporting.jobs import Sweep
from scripts.reporting.style import DARK, LIGHT, make_styles
from tests.scripts.reporting.test_aggregate import job


def rows_of(*labels):
    jobs = [job(label, 1, 1 + n / 10, 1 + n) for n, label in enumerate(labels)]
    return make_rows([Sweep("s", jobs[0].folder.parent, tuple(jobs))])


@pytest.mark.parametrize("seed", range(6))
def test_labels_overlap_nothing_and_none_is_lost(seed):
    chance = random.Random(seed)
    names = [f"pattern_{n}" + "_wide" * chance.randrange(2) for n in range(14)]
    centre = (chance.random(), chance.random())
    points = [tuple(c + chance.gauss(0, 0.1 + 0.1 * seed) for c in centre) for _ in names]  # crowded, less and less
    figure = Figure(figsize=(4.7, 3.7))
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.plot(*zip(*points, strict=True), "o")
    axes.margins(0.18)
    figure.canvas.draw()
    place_labels(axes, points, names)
    texts = [text for text in axes.texts if text.get_text()]
    assert sorted(text.get_text() for text in texts) == sorted(names)
    boxes = [text.get_window_extent() for text in texts]
    for one, other in itertools.combinations(boxes, 2):
        assert not one.overlaps(other)
    for box, (x, y) in itertools.product(boxes, axes.transData.transform(points)):
        assert not box.contains(x, y)


def test_a_pattern_keeps_its_colour_and_dense_has_that_of_text():
    labels = ["window", "dense", *(f"p{n}" for n in range(20))]
    styles = dict(zip(labels, make_styles(rows_of(*labels)), strict=True))
    assert styles["dense"].role == "ink" and styles["window"].role == "c0"
    looks = [(style.role, style.marker, style.dash) for style in styles.values()]
    assert len(set(looks)) == len(looks), "no two look alike"


def test_every_role_has_one_colour_in_light_and_in_dark():
    assert LIGHT.keys() == DARK.keys() and len(set(LIGHT.values())) == len(LIGHT)


def contrast(one: str, other: str) -> float:
    """As WCAG 2 defines it."""

    def luminance(color: str) -> float:
        parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("colors", [LIGHT, DARK], ids=["light", "dark"])
def test_colours_stand_out_from_the_paper(colors):
    """WCAG: 4.5 for text, 3 for marks."""
    for role, least in (("ink", 4.5), ("soft", 4.5), ("front", 3.0), *((f"c{n}", 3.0) for n in range(8))):
        assert contrast(colors[role], colors["paper"]) >= least, role


def test_the_inline_figure_follows_the_pages_colours_and_keeps_its_text():
    rows = rows_of("dense", "window <b>&", "a$b$c")
    svg = to_inline_svg(cost_panels(rows, make_styles(rows))["step_seconds"], "figure")
    assert not re.search(r"#[0-9a-f]{6}\b", svg), "every colour is a variable"
    assert "var(--c0)" in svg and "var(--ink)" in svg and svg.startswith("<svg viewBox=")
    assert "window &lt;b&gt;&amp;" in svg and "a$b$c" in svg and "<b>" not in svg


def test_beyond_what_has_room_points_are_numbered_as_in_the_table():
    rows = rows_of("dense", *(f"window width={n}" for n in range(20)))
    svg = to_inline_svg(cost_panels(rows, make_styles(rows))["step_seconds"], "figure")
    assert "window" not in svg and all(f">{number}</text>" in svg for number in range(1, 22))

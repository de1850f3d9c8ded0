"""Labels that do not overlap, colours that belong to a pattern, and text that stays text."""

import itertools
import random
import re

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from scripts.reporting.aggregate import make_rows
from scripts.reporting.figures import cost_panels, draw_position_differences, to_inline_svg
from scripts.reporting.jobs import Sweep
from scripts.reporting.labels import place_labels
from scripts.reporting.style import DARK, LIGHT, make_styles
from tests.scripts.reporting.test_aggregate import job


def rows_of(*labels):
    jobs = [job(label, 1, 1 + n / 10, 1 + n) for n, label in enumerate(labels)]
    return make_rows([Sweep("s", jobs[0].folder.parent, tuple(jobs))])


@pytest.mark.parametrize("seed", range(4))
def test_names_do_not_overlap_one_another_and_none_is_lost(seed):
    chance = random.Random(seed)
    names = [f"pattern_{n}" + "_wide" * chance.randrange(2) for n in range(9)]
    points = [(chance.gauss(0, 1), chance.gauss(0, 1)) for _ in names]
    figure = Figure(figsize=(4.7, 3.7))
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.plot(*zip(*points, strict=True), "o")
    axes.margins(0.18)
    figure.canvas.draw()
    place_labels(axes, points, names)
    texts = [text for text in axes.texts if text.get_text()]
    assert sorted(text.get_text() for text in texts) == sorted(names)
    for one, other in itertools.combinations([text.get_window_extent() for text in texts], 2):
        assert not one.overlaps(other)


def test_a_pattern_keeps_its_colour_and_dense_has_that_of_text():
    labels = ["window", "dense", *(f"p{n}" for n in range(20))]
    styles = dict(zip(labels, make_styles(rows_of(*labels)), strict=True))
    assert styles["dense"].role == "ink" and styles["window"].role == "c0"
    looks = [(style.role, style.marker, style.dash) for style in styles.values()]
    assert len(set(looks)) == len(looks), "no two look alike"


def test_every_role_has_one_colour_in_light_and_in_dark():
    assert LIGHT.keys() == DARK.keys() and len(set(LIGHT.values())) == len(LIGHT)


def linear(color: str) -> np.ndarray:
    """Linear RGB of "#rrggbb"."""
    parts = np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)


def contrast(one: str, other: str) -> float:
    """As WCAG 2 defines it."""
    dark, light = sorted(float(np.array([0.2126, 0.7152, 0.0722]) @ linear(color)) for color in (one, other))
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("colors", [LIGHT, DARK], ids=["light", "dark"])
def test_colours_stand_out_from_the_paper(colors):
    """WCAG: 4.5 for text, 3 for marks."""
    for role, least in (("ink", 4.5), ("soft", 4.5), ("front", 3.0), *((f"c{n}", 3.0) for n in range(8))):
        assert contrast(colors[role], colors["paper"]) >= least, role


# Machado, Oliveira and Fernandes 2009, at full severity, for linear RGB.
VISIONS = {
    "usual": [[1, 0, 0], [0, 1, 0], [0, 0, 1]],
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.3039]],
}
XYZ = [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]


@pytest.mark.parametrize("vision", VISIONS)
@pytest.mark.parametrize("colors", [LIGHT, DARK], ids=["light", "dark"])
def test_patterns_stay_apart_for_every_eye(colors, vision):
    """CIE 1976 distance; about 2.3 is just to be told apart side by side."""

    def lab(color: str) -> np.ndarray:
        seen = np.clip(np.array(VISIONS[vision]) @ linear(color), 0, 1)
        white = np.array(XYZ) @ np.ones(3)
        ratio = np.array(XYZ) @ seen / white
        x, y, z = np.where(ratio > 0.008856, np.cbrt(ratio), 7.787 * ratio + 16 / 116)
        return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])

    places = [lab(colors[role]) for role in ("ink", *(f"c{n}" for n in range(8)))]
    assert min(np.linalg.norm(one - other) for one, other in itertools.combinations(places, 2)) > 25


def test_the_inline_figure_follows_the_pages_colours_and_keeps_its_text():
    rows = rows_of("dense", "window <b>&", "a$b$c")
    svg = to_inline_svg(cost_panels(rows, make_styles(rows))["step_seconds"], "figure")
    assert not re.search(r"#[0-9a-f]{6}\b", svg), "every colour is a variable"
    assert "var(--c0)" in svg and "var(--ink)" in svg and svg.startswith("<svg viewBox=")
    assert "window &lt;b&gt;&amp;" in svg and "a$b$c" in svg and "<b>" not in svg


@pytest.mark.parametrize(
    ("bounds", "shown"), [((None, None), (-0.01, 0.21)), ((-0.05, 0.3), (-0.06, 0.31)), ((-9.0, 9.0), (-0.21, 0.41))]
)
def test_differences_by_position_fill_their_panel(bounds, shown):
    """Bands are shown in full, but for those of two seeds, which would flatten every line."""
    bucket = {"start": 0, "stop": 512, "loss": 0.2} | dict(zip(("low", "high"), bounds, strict=True))
    rows = rows_of("dense", "window")
    axes = Figure().add_subplot()
    draw_position_differences(axes, [[], [bucket]], make_styles(rows), "nats per token")
    assert axes.get_ylim() == pytest.approx(shown)


def test_beyond_what_has_room_points_are_numbered_as_in_the_table():
    rows = rows_of("dense", *(f"window width={n}" for n in range(20)))
    svg = to_inline_svg(cost_panels(rows, make_styles(rows))["step_seconds"], "figure")
    assert "window" not in svg and all(f">{number}</text>" in svg for number in range(1, 22))

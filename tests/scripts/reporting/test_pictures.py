"""Pictures are made whatever the length, at bounded memory."""

import itertools

import matplotlib.image
import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from kernels import Axis
from kernels.patterns import Dense, Hierarchical, Window
from model.attention import build_attention_layout
from scripts.reporting.figures import PANEL
from scripts.reporting.pictures import _shades, draw_loss_by_position, draw_patterns, plot_loss_by_position


def test_a_pattern_of_a_million_tokens_is_drawn(tmp_path, monkeypatch):
    monkeypatch.setattr("scripts.reporting.pictures.LONGEST", 3072)  # a pattern of 8192 tokens takes three seconds
    file = tmp_path / "report" / "pattern.png"
    hierarchical = Hierarchical(window=1024, spans=(16, 1024), reaches=(2048,), pooling="mean")
    draw_patterns({"window": Window(1024), "dense": Dense(), "hierarchical": hierarchical}, 1 << 20, file)
    image = matplotlib.image.imread(file)
    assert image.shape[1] > 2 * 300 and image[..., :3].std() > 0.1


def test_loss_by_position_is_drawn(tmp_path):
    bucket = {"start": 0, "stop": 512, "tokens": 512, "loss": 3.0, "low": 2.9, "high": 3.1}
    rows = [{"by_position": [bucket, bucket | {"start": 512, "stop": 1024, "loss": 2.5}]}] * 2
    draw_loss_by_position(rows, ["a", "b"], tmp_path / "loss.png")
    assert matplotlib.image.imread(tmp_path / "loss.png")[..., :3].std() > 0.01


def test_a_bucket_that_one_document_reaches_has_no_band():
    bucket = {"start": 0, "stop": 512, "loss": 3.0, "low": 2.9, "high": 3.1}
    alone = {"start": 1024, "stop": 2048, "loss": 2.0, "low": None, "high": None}
    figure, axes = plt.subplots()
    plot_loss_by_position(axes, [bucket, bucket | {"start": 512, "stop": 1024}, alone], "nats per token")
    (band,) = axes.collections
    assert band.get_paths()[0].vertices[:, 0].max() == 768, "the band ends with the last bucket of several documents"
    assert axes.lines[0].get_xdata()[-1] == 1536
    plt.close(figure)


def test_wide_bands_do_not_flatten_the_lines():
    """Two documents reach the last bucket: its interval is many times as wide as what the lines show."""
    wide = {"start": 512, "stop": 1024, "loss": 2.5, "low": -30.0, "high": 35.0}
    figure, axes = plt.subplots()
    for shift in (0.0, 0.2):
        bucket = {"start": 0, "stop": 512, "loss": 3.0 + shift, "low": 2.9, "high": 3.4}
        plot_loss_by_position(axes, [bucket, wide], "nats per token")
    low, high = axes.get_ylim()
    assert low < 2.5 and high > 3.4 and high - low <= 3.1 * (3.2 - 2.5)
    plt.close(figure)


@pytest.mark.parametrize("doublings", [1, 4, 6, 8, 12, 16])
def test_labels_of_positions_do_not_touch(doublings):
    edges = [0, *(512 << doubling for doubling in range(doublings + 1))]
    buckets = [{"start": a, "stop": b, "loss": 1.0, "low": None, "high": None} for a, b in itertools.pairwise(edges)]
    figure = Figure(figsize=PANEL, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    plot_loss_by_position(axes, buckets, "nats per value")
    figure.canvas.draw()
    (left, right), labels = axes.get_xlim(), axes.get_xticklabels()
    boxes = [label.get_window_extent() for label in labels if left <= label.get_position()[0] <= right]
    assert len(boxes) >= 2
    for one, other in itertools.pairwise(boxes):
        assert one.x1 + 4 < other.x0


def test_summaries_are_painted_lighter_than_tokens():
    pattern = Hierarchical(window=16, spans=(4, 16), reaches=(64,), pooling="mean")
    layout = build_attention_layout(pattern, Axis.tokens(256), 16)
    shades = _shades(layout, cells=256)
    assert [shades[255, token] for token in (255, 240, 200, 100, 0)] == [1, 1, 0.5, 0.25, 0.25]
    assert not shades[100, 101:].any() and shades[np.tril_indices(256)].all()

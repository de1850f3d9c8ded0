"""Reach by depth, against walking every path."""

import numpy as np
import pytest
import torch

from configs.build import build_plan
from scripts.reach import layer_mask, product, reach_by_depth, terminal_picture, union_density, unreached
from tests.commands import compose, run

LENGTH = 48


def plan_of(*overrides):
    return build_plan(compose(*overrides, config_name="show_pattern")["attention"] | {"block": 16})


def walked(plan, layers):
    """What each token can know of, found by walking edges, one token and layer at a time."""
    masks = [layer_mask(plan, layer, LENGTH)[1].tolist() for layer in range(layers)]
    found = []
    for query in range(LENGTH):
        front = {query}
        for mask in reversed(masks):
            front |= {key for token in front for key in range(LENGTH) if mask[token][key]}
        found.append([key in front for key in range(LENGTH)])
    return torch.tensor(found)


@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize(
    "overrides",
    [
        ("attention=window", "attention.patterns.local.width=5"),
        ("attention=strided", "attention.patterns.strided={window: 3, stride: 8, columns: 2}"),
        ("attention=window_dense", "attention.patterns.local.width=4", "attention.schedule=[local,full]"),
        ("attention=window_dense", "attention.patterns.local.width=4", "attention.schedule=[[local,full],local]"),
    ],
    ids=["window", "strided", "schedule", "heads"],
)
def test_reach_is_what_walking_finds(overrides, layers):
    plan = plan_of(*overrides)
    depths, known = reach_by_depth(plan, layers, LENGTH)
    expected = walked(plan, layers)
    assert torch.equal(known, expected)
    assert depths[-1].share == pytest.approx(float(expected.sum()) / (LENGTH * (LENGTH + 1) / 2))
    assert depths[-1].last_knows == int(expected[-1].sum()) - 1
    assert unreached(known) == int((~expected).tril().sum())


def test_windows_reach_further_by_their_width_with_each_layer():
    depths, _ = reach_by_depth(plan_of("attention=window", "attention.patterns.local.width=5"), 4, LENGTH)
    assert [depth.furthest for depth in depths] == [4, 8, 12, 16]


def test_the_first_layer_is_the_product_s_last_factor():
    """Token 2 sees 1 in the upper layer, and 1 sees 0 in the lower one: 2 knows of 0, and not the other way round."""
    upper, lower = torch.eye(3).bool(), torch.eye(3).bool()
    upper[2, 1] = lower[1, 0] = True
    assert product(upper, lower)[2, 0] and not product(lower, upper)[2, 0]


def test_union_and_terminal_picture():
    lower = torch.ones(32, 32).tril().bool()
    diagonal = torch.eye(32).bool()
    assert union_density([diagonal, lower]) == 1 and union_density([diagonal]) == pytest.approx(32 / 528)
    lines = terminal_picture(lower, rows=8).split("\n")
    assert len(lines) == 8 and lines[-1][:2] == "██" and lines[0][-2:] == "  " and lines[0][:2] == "▓▓"


def test_the_command_says_it_all(tmp_path):
    arguments = ("attention=window", "attention.patterns.local.width=32", "length=512", "reach_length=256", "zoom=64")
    result = run("scripts/show_pattern.py", *arguments, "layers=3", f"output={tmp_path}/w.png")
    text = " ".join(result.stdout.split())
    for words in (
        "reach by depth",
        "local, 256 tokens",
        "local, the last 64",
        "seen by some layer",
        "warning: after 3",
    ):
        assert words in text, words
    import matplotlib.image

    picture = matplotlib.image.imread(tmp_path / "w.png")
    assert picture.shape[0] > 1.5 * picture.shape[1], "whole above, zoomed below"
    assert np.ptp(picture[..., 0]) > 0.5
    dense = run(
        "scripts/show_pattern.py", "attention=dense", "length=256", "reach_length=128", f"output={tmp_path}/d.png"
    )
    assert "warning" not in dense.stdout

"""Reach by depth, against walking every path."""

import pytest
import torch

from configs.build import build_plan
from model.attention.reach import layer_mask, product, reach_by_depth, union_density, unreached
from tests.commands import compose

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
    assert depths[-1].influences == int(expected[-1].sum()) - 1
    assert unreached(known) == int((~expected).tril().sum())


def test_windows_reach_further_by_their_width_with_each_layer():
    depths, _ = reach_by_depth(plan_of("attention=window", "attention.patterns.local.width=5"), 4, LENGTH)
    assert [depth.furthest for depth in depths] == [4, 8, 12, 16]


def test_the_first_layer_is_the_product_s_last_factor():
    """Token 2 sees 1 in the upper layer, and 1 sees 0 in the lower one: 2 knows of 0, and not the other way round."""
    upper, lower = torch.eye(3).bool(), torch.eye(3).bool()
    upper[2, 1] = lower[1, 0] = True
    assert product(upper, lower)[2, 0] and not product(lower, upper)[2, 0]


def test_union_density_counts_pairs_that_any_mask_contains():
    lower, diagonal = torch.ones(32, 32).tril().bool(), torch.eye(32).bool()
    assert union_density([diagonal, lower]) == 1 and union_density([diagonal]) == pytest.approx(32 / 528)

"""Losses and gradients of sequences that several ranks share equal those of one process, for every pattern."""

import pytest
import torch

from model.parallel.ranges import contiguous, interleaved, take
from tests.model.parallel.models import BATCH, CONTIGUOUS, LENGTH, MASKS, PATTERNS, SCHEDULES
from tests.model.parallel.ranks import run_on_ranks
from tests.model.parallel.workers import all_models, losses_and_gradients, sent_bytes

NAMES = [*PATTERNS, *SCHEDULES]
INTERLEAVED = [name for name in NAMES if name not in CONTIGUOUS]


@pytest.fixture(scope="module")
def expected():
    return {name: losses_and_gradients(name) for name in NAMES}


@pytest.fixture(scope="module", params=[2, 4])
def found(request):
    return run_on_ranks(all_models, request.param, NAMES)


@pytest.fixture(scope="module")
def found_interleaved():
    """Of 4 ranks; test_context_training.py has 2."""
    return run_on_ranks(all_models, 4, INTERLEAVED, True)


def assert_same(name, found, expected, parts):
    by_rank, whole = [each[name] for each in found], expected[name]
    for held, result in zip(parts, by_rank, strict=True):
        torch.testing.assert_close(result["per_token"], take(whole["per_token"], held), rtol=1e-10, atol=1e-10)
    for key in set(whole) - {"per_token"}:
        total = sum(result[key] for result in by_rank)
        scale = whole[key].double().abs().max().item()
        torch.testing.assert_close(total, whole[key], rtol=0, atol=1e-10 * max(1, scale), msg=f"{name}: {key}")


@pytest.mark.parametrize("name", NAMES)
def test_contiguous_parts(name, found, expected):
    assert_same(name, found, expected, contiguous(LENGTH, len(found)))


@pytest.mark.parametrize("name", INTERLEAVED)
def test_interleaved_parts(name, found_interleaved, expected):
    assert_same(name, found_interleaved, expected, interleaved(LENGTH, len(found_interleaved)))


def test_a_layer_compiles_as_one_graph(expected):
    """Exchanges are operators, so that a GPU's compiled layers hold them."""
    names = ["window", "dense", "native_sparse_learned"]
    found = run_on_ranks(all_models, 2, names, False, True)
    for name in names:
        assert_same(name, found, expected, contiguous(LENGTH, 2))


def test_documents_cross_every_cut():
    """What the other tests rely on."""
    for cut in range(64, LENGTH, 64):
        assert (BATCH["document"][:, cut] == BATCH["document"][:, cut - 1]).all()
    assert set(MASKS) < set(NAMES)


MEASURED = [name for name in NAMES if name != "window"]
"""All but the model with activation checkpointing, which sends what the forward pass sent again."""


def test_bytes_sent_are_those_that_the_layouts_name():
    found = run_on_ranks(sent_bytes, 4, MEASURED)
    for name in MEASURED:
        for result in (each[name] for each in found):
            assert result["computed"] == result["measured"], name
        assert sum(result[name]["measured"][0] for result in found) > 0
    halo, everything = (found[0][name]["measured"][0] for name in ("dilated", "dense"))
    assert halo < everything / 2, "a window's ranks exchange a halo alone"

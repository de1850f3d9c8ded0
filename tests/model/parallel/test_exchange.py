"""Exchanges among ranks, forward and backward, against what one process computes of the whole axis."""

import pytest
import torch

from kernels.patterns import Dense, Dilated, Strided, Window
from model.parallel.ranges import Ranges, contiguous, extended, interleaved, reach, size, take
from tests.model.parallel.ranks import run_on_ranks
from tests.model.parallel.workers import exchange_all

LENGTH = 32
WHOLE = (range(LENGTH),)


def cases(ranks: int) -> dict[str, tuple[tuple[Ranges, ...], tuple[Ranges, ...]]]:
    """Name -> the ranges that each rank holds, and those that it wants."""
    parts, pairs = contiguous(LENGTH, ranks), interleaved(LENGTH, ranks)
    halo = lambda held, before, after: tuple(extended(each, before, after, LENGTH) for each in held)  # noqa: E731
    return {
        "gather": (parts, (WHOLE,) * ranks),
        "gather_interleaved": (pairs, (WHOLE,) * ranks),
        "halo": (parts, halo(parts, 3, 0)),
        "halo_over_several_ranks": (parts, halo(parts, 20, 0)),
        "halo_after": (parts, halo(parts, 0, 5)),
        "halo_interleaved": (pairs, halo(pairs, 2, 0)),
        "nothing": (parts, parts),
    }


@pytest.fixture(scope="module")
def inputs():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, LENGTH, 3, dtype=torch.float64, generator=generator) for _ in range(2)]


@pytest.fixture(scope="module", params=[2, 4])
def found(request, inputs):
    return run_on_ranks(exchange_all, request.param, cases(request.param), *inputs)


@pytest.mark.parametrize("name", cases(2))
def test_each_rank_receives_what_it_wants_and_gradients_go_back(found, inputs, name):
    (x, weight), ranks = inputs, len(found)
    held, wanted = cases(ranks)[name]
    leaf = x.clone().requires_grad_()
    loss = 0
    for rank in range(ranks):
        of_wanted = take(weight, wanted[rank]) * (rank + 1)
        loss += (take(leaf, wanted[rank]) * of_wanted + take(leaf, wanted[rank]) ** 2 * of_wanted.cos()).sum()
    loss.backward()
    for rank, result in enumerate(each[name] for each in found):
        torch.testing.assert_close(result["plain"], take(x, wanted[rank]), rtol=0, atol=0)
        torch.testing.assert_close(result["square"], take(x**2, wanted[rank]), rtol=0, atol=0)
        torch.testing.assert_close(result["grad"], take(leaf.grad, held[rank]), rtol=0, atol=1e-13)


def test_entries_sent_are_those_that_others_want(found):
    """Of all ranks together, the entries sent forward are those received from others, and their gradients return."""
    ranks = len(found)
    for name, (held, wanted) in cases(ranks).items():
        received = sum(size(want) - size(own) for own, want in zip(held, wanted, strict=True))
        forward, backward = zip(*(each[name]["sent"] for each in found), strict=True)
        assert sum(forward) == sum(backward) == received, name
    assert [each["halo"]["sent"] for each in found] == [(3, 0), *[(3, 3)] * (ranks - 2), (0, 3)]


def test_interleaved_parts_have_equal_work():
    """Each rank's queries see equally many keys under causal attention."""
    pairs = [sum(i + 1 for each in held for i in each) for held in interleaved(96, 4)]
    assert len(set(pairs)) == 1 and sorted(i for held in interleaved(96, 4) for r in held for i in r) == list(range(96))


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        (Window(20), 19),
        (Window(20, sink_tokens=1), None),
        (Window(65), None),
        (Dilated(3, 4), 8),
        (Strided(10, 16), None),
        (Dense(), None),
        ((Window(20), Window(30)), 29),
        ((Window(20), Dense()), None),
    ],
)
def test_reach(pattern, expected):
    """A pattern with columns or sinks sees keys from any distance, and so does a window longer than the sequence."""
    assert reach(pattern, 64) == expected

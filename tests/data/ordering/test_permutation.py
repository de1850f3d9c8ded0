"""A permutation holds every number once; a large one takes no memory and is as random as a small one."""

import tracemalloc
from itertools import islice

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.ordering.permutation import EXPLICIT, LazyPermutation, permutation
from data.ordering.sampler import Phase, ResumableSampler

BILLION = 10**9


@settings(max_examples=20, deadline=None)
@given(size=st.integers(1, 200), key=st.tuples(st.integers(0, 2**32), st.integers(0, 100)))
def test_every_number_once(size, key):
    order = LazyPermutation(size, *key)
    assert len(order) == size and sorted(order) == list(range(size))


def test_small_permutations_are_numpys_and_large_ones_are_lazy():
    assert permutation(50, 3, 1).tolist() == np.random.default_rng((3, 1)).permutation(50).tolist()
    assert len(permutation(EXPLICIT, 3, 1)) == EXPLICIT and isinstance(permutation(EXPLICIT, 3, 1), np.ndarray)
    large = permutation(EXPLICIT + 1, 3, 1)
    assert isinstance(large, LazyPermutation) and len(large) == EXPLICIT + 1
    with pytest.raises(IndexError):
        large[EXPLICIT + 1]


def excess(observed: np.ndarray, cells: int, freedom: int) -> float:
    """Returns how far the counts are from an even spread over `cells`: chi-square, in standard deviations."""
    expected = observed.sum() / cells
    return (((observed - expected) ** 2 / expected)[:cells].sum() - freedom) / np.sqrt(2 * freedom)


def test_keys_spread_evenly_over_the_permutations():
    """Each number reaches each place as often, and so does each difference between neighbours."""
    size, keys = 24, 400
    orders = np.array([list(LazyPermutation(size, 0, key)) for key in range(keys)])
    counts = np.zeros((size, size))
    np.add.at(counts, (np.arange(size), orders), 1)
    assert abs(excess(counts.ravel(), size**2, (size - 1) ** 2)) < 4
    steps = np.bincount((np.diff(orders, axis=1) % size).ravel(), minlength=size)[1:]
    assert abs(excess(steps, size - 1, size - 2)) < 4
    fixed = (orders == np.arange(size)).sum(axis=1)
    assert abs(fixed.mean() - 1) < 4 / np.sqrt(keys)  # a random permutation has one fixed point on average


def test_a_billion_samples_take_no_memory_and_look_random():
    def sampler():
        return ResumableSampler(range(BILLION), 0, 10, lambda: BILLION - 1000, 0, 1)

    tracemalloc.start()
    list(islice(sampler(), 50))
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()
    read = np.array(list(islice(sampler(), 2000)))
    for one in (read[:1000], read[1000:]):  # the end of a pass and the begin of the next one
        assert len(set(one)) == 1000 and one.min() >= 0 and one.max() < BILLION
        assert abs(excess(np.bincount(one * 25 // BILLION, minlength=25), 25, 24)) < 4
        assert abs(np.corrcoef(one[:-1], one[1:])[0, 1]) < 4 / np.sqrt(1000)
        assert abs(excess(np.bincount(one % 7, minlength=7), 7, 6)) < 4


@pytest.mark.parametrize("cursor", [0, 5 * 10**8 + 3, BILLION - 4])
def test_large_passes_resume_on_any_number_of_ranks_and_in_phases(cursor):
    def sampler(cursor, rank=0, world_size=1):
        phases = (Phase(0, 4), Phase(BILLION // 10, 1))
        return ResumableSampler(range(BILLION), 1, 10, lambda: cursor, rank, world_size, phases)

    whole = list(islice(sampler(cursor), 12))
    assert list(islice(sampler(cursor + 5), 7)) == whole[5:]
    ranks = [list(islice(sampler(cursor, rank, 3), 4)) for rank in range(3)]
    assert [ranks[n % 3][n // 3] for n in range(12)] == whole

"""The order of samples is a function of (seed, samples consumed), whoever reads it."""

from itertools import islice

import pytest

from data.stream import Stream


def stream(cursor: int = 0, seed: int = 0, rank: int = 0, world_size: int = 1, size: int = 10) -> Stream:
    return Stream(range(size), seed, length=25, cursor=lambda: cursor, rank=rank, world_size=world_size)


def test_each_pass_is_another_permutation_of_everything():
    samples = list(islice(stream(), 30))
    passes = [samples[0:10], samples[10:20], samples[20:30]]
    assert all(sorted(one) == list(range(10)) for one in passes)
    assert passes[0] != passes[1] != passes[2]
    assert samples != list(islice(stream(seed=1), 30))


@pytest.mark.parametrize("cursor", [0, 1, 9, 10, 17, 25])
def test_it_goes_on_at_the_cursor(cursor):
    assert list(islice(stream(cursor), 20)) == list(islice(stream(), cursor + 20))[cursor:]


def test_ranks_share_the_samples():
    alone = list(islice(stream(cursor=5), 24))
    ranks = [list(islice(stream(cursor=5, rank=rank, world_size=3), 8)) for rank in range(3)]
    assert [ranks[i % 3][i // 3] for i in range(24)] == alone


def test_its_length_is_the_whole_runs_and_no_limit():
    assert len(stream(cursor=20)) == 25
    assert len(list(islice(stream(cursor=20), 100))) == 100

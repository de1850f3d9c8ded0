"""The order of samples is a function of (seed, samples consumed)."""

from itertools import islice

import pytest

from data.sampler import ResumableSampler


def sampler(cursor: int = 0, seed: int = 0, rank: int = 0, world_size: int = 1, size: int = 10) -> ResumableSampler:
    return ResumableSampler(range(size), seed, length=25, cursor=lambda: cursor, rank=rank, world_size=world_size)


def test_each_pass_is_another_permutation_of_everything():
    samples = list(islice(sampler(), 30))
    passes = [samples[0:10], samples[10:20], samples[20:30]]
    assert all(sorted(one) == list(range(10)) for one in passes)
    assert passes[0] != passes[1] != passes[2]
    assert samples != list(islice(sampler(seed=1), 30))


@pytest.mark.parametrize("cursor", [0, 1, 9, 10, 17, 25])
def test_it_goes_on_at_the_cursor(cursor):
    assert list(islice(sampler(cursor), 20)) == list(islice(sampler(), cursor + 20))[cursor:]


def test_ranks_share_the_samples():
    alone = list(islice(sampler(cursor=5), 24))
    ranks = [list(islice(sampler(cursor=5, rank=rank, world_size=3), 8)) for rank in range(3)]
    assert [ranks[i % 3][i // 3] for i in range(24)] == alone


def test_its_length_is_the_whole_runs_and_no_limit():
    assert len(sampler(cursor=20)) == 25
    assert len(list(islice(sampler(cursor=20), 100))) == 100

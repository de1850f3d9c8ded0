"""The order of samples is a function of (seed, samples consumed)."""

from itertools import islice

import pytest

from data.ordering.sampler import Batches, Phase, ResumableSampler

ONE = (Phase(0, 1),)
GROWING = (Phase(0, 4), Phase(6, 2), Phase(12, 4), Phase(14, 1))
"""Of 10 sequences a pass: the first pass ends within the second phase, and the last phase begins in the second pass."""

STARTS = [0, 24, 36, 44]
"""The first sample of each phase: 6 sequences in 4 samples each, 6 in 2, 2 in 4."""


def sampler(
    cursor: int = 0, seed: int = 0, rank: int = 0, world_size: int = 1, size: int = 10, phases=ONE
) -> ResumableSampler:
    return ResumableSampler(range(size), seed, 25, lambda: cursor, rank, world_size, phases)


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


def quarters(indices: list[int], phases=GROWING, size: int = 10) -> list[int]:
    """The quarters of sequences that samples consist of, each as 4 x sequence + quarter."""
    found, bases = [], [0]
    for phase in phases:
        bases.append(bases[-1] + size * phase.cuts)
    for index in indices:
        number = next(n for n in range(len(phases)) if index < bases[n + 1])
        each = 4 // phases[number].cuts
        first = (index - bases[number]) * each
        found += range(first, first + each)
    return found


def test_phases_of_shorter_samples_read_every_sequence_once_in_a_pass():
    samples = list(islice(sampler(phases=GROWING), 44 + 26))
    read = quarters(samples)
    assert len(read) == 4 * 40
    for number in range(4):
        assert sorted(read[40 * number : 40 * (number + 1)]) == list(range(40))
    shuffled = [each // 4 for each in read[:24]]
    assert len(set(shuffled)) == 6 and shuffled != sorted(shuffled, key=shuffled.index), "not one sequence at a time"


def test_the_last_phase_reads_what_it_would_without_earlier_ones():
    last = list(islice(sampler(cursor=STARTS[-1], phases=GROWING), 30))
    alone = list(islice(sampler(cursor=14), 30))
    before = 10 * (4 + 2 + 4)  # samples of the earlier phases in the dataset
    assert [index - before for index in last] == alone


@pytest.mark.parametrize("cursor", [0, 1, 23, 24, 25, 36, 43, 44, 50])
def test_it_goes_on_at_the_cursor_in_every_phase(cursor):
    straight = list(islice(sampler(phases=GROWING), 70))
    assert list(islice(sampler(cursor, phases=GROWING), 70 - cursor)) == straight[cursor:]
    ranks = [list(islice(sampler(cursor, rank=rank, world_size=2, phases=GROWING), 10)) for rank in range(2)]
    assert [index for pair in zip(*ranks, strict=True) for index in pair] == straight[cursor:][:20]


def test_batches_have_as_many_tokens_in_every_phase():
    batches = list(islice(Batches(sampler(phases=GROWING), batch_size=2), 9))
    assert [len(batch) for batch in batches] == [8, 8, 8, 4, 4, 4, 8, 2, 2]
    assert [index for batch in batches for index in batch] == list(islice(sampler(phases=GROWING), 48))

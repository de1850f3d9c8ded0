"""Recall tasks in token ids: what is scored can be answered, from exactly one place, as far back as was asked for."""

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data import CorpusError
from data.packing import NO_TARGET
from data.recall import Samples, alphabet, associative_recall, copy, needle
from data.recall.synthetic import BOS, MARKER

VOCABULARY = 64
KEYS, VALUES, NOISE = (set(part) for part in alphabet(VOCABULARY))


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def questions(batch):
    """(tokens, index of the question's token, target) of every scored token."""
    for tokens, targets in zip(batch["tokens"].tolist(), batch["targets"].tolist(), strict=True):
        for index, target in enumerate(targets):
            if target != NO_TARGET:
                yield tokens, index, target


TASKS = {
    "associative_recall": partial(associative_recall, length=90, pairs=5, vocabulary=VOCABULARY, min_distance=40),
    "needle": partial(needle, length=90, vocabulary=VOCABULARY, size=3),
    "copy": partial(copy, length=90, size=6, distance=50, vocabulary=VOCABULARY),
}


@pytest.mark.parametrize("name", TASKS)
def test_a_batch_is_like_that_of_a_data_module(name):
    batch = TASKS[name](4, generator=seeded())
    kinds = {key: tensor.dtype for key, tensor in batch.items()}
    assert kinds == {"tokens": torch.int64, "targets": torch.int64, "document": torch.int32, "position": torch.int32}
    assert all(tensor.shape == (4, 90) for tensor in batch.values())
    assert (batch["tokens"][:, 0] == BOS).all() and int(batch["tokens"].max()) < VOCABULARY
    assert (batch["position"] == torch.arange(90)).all() and not batch["document"].any()


@pytest.mark.parametrize("name", TASKS)
def test_targets_are_the_next_tokens(name):
    batch = TASKS[name](8, generator=seeded())
    following, targets = batch["tokens"][:, 1:], batch["targets"][:, :-1]
    scored = targets != NO_TARGET
    assert scored.any() and torch.equal(targets[scored], following[scored])


@pytest.mark.parametrize("name", TASKS)
def test_the_generator_alone_decides(name):
    first, again, other = (TASKS[name](3, generator=seeded(seed)) for seed in (1, 1, 2))
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not torch.equal(first["tokens"], other["tokens"])


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 8), st.integers(2, 60), st.integers(0, 40), st.integers(0, 99))
def test_associative_recall_is_answered_by_one_pair_far_enough_back(pairs, min_distance, spare, seed):
    queries = 1 + seed % pairs
    length = 2 * (pairs - 1) + min_distance + 2 * queries + spare
    batch = associative_recall(
        2,
        length,
        pairs=pairs,
        queries=queries,
        vocabulary=VOCABULARY,
        min_distance=min_distance,
        generator=seeded(seed),
    )
    found = list(questions(batch))
    assert len(found) == 2 * queries
    for tokens, index, target in found:
        key = tokens[index]
        (pair,) = [i for i in range(index) if tokens[i] == key]
        assert key in KEYS and target in VALUES and tokens[pair + 1] == target
        assert index - pair >= min_distance


def test_associative_recall_reaches_its_least_distance():
    """`min_distance` is no more cautious than it says: the last pair is asked exactly so far away."""
    batch = associative_recall(200, 60, pairs=3, vocabulary=VOCABULARY, min_distance=30, generator=seeded())
    distances = [index - tokens.index(tokens[index]) for tokens, index, _ in questions(batch)]
    assert min(distances) == 30


def test_associative_recall_asks_for_every_key_by_default_and_fills_the_rest_with_noise():
    batch = associative_recall(1, 70, pairs=6, vocabulary=VOCABULARY, min_distance=2, generator=seeded())
    tokens = batch["tokens"][0].tolist()
    asked = {tokens[index] for _, index, _ in questions(batch)}
    assert asked == set(tokens[1:13:2]) and len(asked) == 6
    assert sum(token in NOISE for token in tokens) >= 70 - 1 - 4 * 6


@pytest.mark.parametrize("position", [1, 17, 82])
def test_the_needle_lies_where_it_is_put(position):
    batch = needle(5, 90, vocabulary=VOCABULARY, size=3, position=position, generator=seeded())
    for tokens, index, target in questions(batch):
        assert 87 <= index <= 89
        key = tokens[87]
        assert key in KEYS and [i for i, token in enumerate(tokens) if token == key] == [position, 87]
        assert tokens[position + 1 + index - 87] == target and target in VALUES


def test_needles_are_put_sequence_by_sequence_or_anywhere():
    position = torch.tensor([1, 40, 80])
    tokens = needle(3, 90, vocabulary=VOCABULARY, size=1, position=position, generator=seeded())["tokens"]
    is_key = (tokens >= min(KEYS)) & (tokens <= max(KEYS))
    assert is_key.int().argmax(1).tolist() == position.tolist()
    tokens = needle(500, 20, vocabulary=VOCABULARY, size=1, generator=seeded())["tokens"]
    is_key = (tokens >= min(KEYS)) & (tokens <= max(KEYS))
    assert set(is_key.int().argmax(1).tolist()) == set(range(1, 18))


@pytest.mark.parametrize("distance", [7, 50, 83])
def test_a_copy_lies_at_its_distance(distance):
    batch = copy(3, 90, size=6, distance=distance, vocabulary=VOCABULARY, generator=seeded())
    found = list(questions(batch))
    assert len(found) == 18
    for tokens, index, target in found:
        assert index >= 84 and tokens[84] == tokens[84 - distance] == MARKER
        assert tokens[index + 1 - distance] == target and target in VALUES


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (partial(associative_recall, 1, 90, pairs=21), r"pairs=21: accepted is 1 to 20 for vocabulary=64"),
        (partial(associative_recall, 1, 90, pairs=4, queries=5), r"queries=5: accepted is 1 to pairs=4"),
        (partial(associative_recall, 1, 50, pairs=4, min_distance=40), r"length=50: accepted is at least 54"),
        (partial(associative_recall, 1, 90, pairs=4, min_distance=1), r"min_distance=1: accepted is a whole number"),
        (partial(needle, 1, 90, position=88), r"position=\[88\]: accepted is 1 to 87 for length=90"),
        (partial(needle, 1, 3), r"length=3: accepted is at least 4"),
        (partial(copy, 1, 90, size=6, distance=6), r"distance=6: accepted is 7 to 83"),
        (partial(copy, 1, 90, size=6, distance=84), r"distance=84: accepted is 7 to 83"),
    ],
)
def test_what_cannot_be_is_refused_with_what_can(make, message):
    with pytest.raises(CorpusError, match=message):
        make(vocabulary=VOCABULARY, generator=seeded())


def test_what_is_said_to_be_accepted_is():
    associative_recall(1, 54, pairs=4, min_distance=40, vocabulary=VOCABULARY, generator=seeded())
    needle(1, 90, position=87, vocabulary=VOCABULARY, generator=seeded())
    needle(1, 4, vocabulary=VOCABULARY, generator=seeded())
    with pytest.raises(CorpusError, match="vocabulary=7: accepted is a whole number of at least 8"):
        needle(1, 90, vocabulary=7, generator=seeded())


def test_samples_are_a_function_of_seed_and_index():
    samples = Samples(TASKS["needle"], count=3, seed=5)
    assert len(list(samples)) == len(samples) == 3
    assert samples[0]["tokens"].shape == (90,)
    again = Samples(TASKS["needle"], count=9, seed=5)
    assert all(torch.equal(samples[i]["tokens"], again[i]["tokens"]) for i in range(3))
    assert not torch.equal(samples[0]["tokens"], samples[1]["tokens"])
    assert not torch.equal(samples[0]["tokens"], Samples(TASKS["needle"], count=3, seed=6)[0]["tokens"])

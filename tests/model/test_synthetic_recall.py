"""Synthetic recall: every question has one answer, which lies as far back as the task promises."""

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data.collation import NO_TARGET
from tests.model.synthetic_recall import BOS, alphabet, associative_recall, needle

VOCABULARY = 64
KEYS, VALUES, NOISE = (set(ids) for ids in alphabet(VOCABULARY))

TASKS = {
    "associative_recall": partial(associative_recall, length=90, pairs=5, vocabulary=VOCABULARY, min_distance=40),
    "needle": partial(needle, length=90, vocabulary=VOCABULARY, size=3),
}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def questions(batch):
    """(tokens, index of the question's token, target) of every target."""
    for tokens, targets in zip(batch["tokens"].tolist(), batch["targets"].tolist(), strict=True):
        for index, target in enumerate(targets):
            if target != NO_TARGET:
                yield tokens, index, target


@pytest.mark.parametrize("name", TASKS)
def test_a_batch_is_like_that_of_a_data_module(name):
    batch = TASKS[name](4, generator=seeded())
    kinds = {key: tensor.dtype for key, tensor in batch.items()}
    assert kinds == {"tokens": torch.int64, "targets": torch.int64, "document": torch.int32, "position": torch.int32}
    assert all(tensor.shape == (4, 90) for tensor in batch.values())
    assert (batch["tokens"][:, 0] == BOS).all() and int(batch["tokens"].max()) < VOCABULARY
    assert (batch["position"] == torch.arange(90)).all() and not batch["document"].any()
    following, targets = batch["tokens"][:, 1:], batch["targets"][:, :-1]
    scored = targets != NO_TARGET
    assert scored.any() and torch.equal(targets[scored], following[scored])


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 8), st.integers(2, 60), st.integers(0, 40), st.integers(0, 99))
def test_associative_recall_has_one_answer_far_enough_back(pairs, min_distance, spare, seed):
    length = 2 * (pairs - 1) + min_distance + 2 * pairs + spare
    batch = associative_recall(
        2, length, pairs=pairs, vocabulary=VOCABULARY, min_distance=min_distance, generator=seeded(seed)
    )
    found = list(questions(batch))
    assert len(found) == 2 * pairs
    for tokens, index, target in found:
        key = tokens[index]
        (pair,) = [i for i in range(index) if tokens[i] == key]
        assert key in KEYS and target in VALUES and tokens[pair + 1] == target
        assert index - pair >= min_distance


def test_associative_recall_reaches_its_least_distance():
    batch = associative_recall(200, 60, pairs=3, vocabulary=VOCABULARY, min_distance=30, generator=seeded())
    distances = [index - tokens.index(tokens[index]) for tokens, index, _ in questions(batch)]
    assert min(distances) == 30


def test_the_needle_lies_anywhere_before_its_question():
    batch = needle(500, 20, vocabulary=VOCABULARY, size=2, generator=seeded())
    places = set()
    for tokens, index, target in questions(batch):
        key = tokens[18]
        place, question = [i for i, token in enumerate(tokens) if token == key]
        assert key in KEYS and question == 18 and tokens[place + 1 + index - 18] == target and target in VALUES
        places.add(place)
    assert places == set(range(1, 16))

"""The Markov model against its definition, on documents of few symbols."""

import math
from collections import Counter, defaultdict

import numpy as np
import pytest

from data.baselines import markov_bits_per_byte, seasonal_naive, symbols_of
from data.tokenizers import Bytes


class Documents:
    """A split of random DNA in which each base depends on the second one before it."""

    def __init__(self, seed: int, lengths, letters: str = "ACGT"):
        generator = np.random.default_rng(seed)
        self.texts = []
        for length in lengths:
            bases = list(generator.integers(len(letters), size=2))
            while len(bases) < length:
                bases.append((bases[-2] + 1) % 4 if generator.random() < 0.9 else generator.integers(len(letters)))
            self.texts.append("".join(letters[base] for base in bases))
        self.flat = np.concatenate([[256, *text.encode()] for text in self.texts]).astype(np.uint16)
        self.total_bytes = sum(map(len, self.texts))

    def head(self, tokens: int) -> np.ndarray:
        return self.flat[:tokens]


class TrainedOn:
    tokenizer = Bytes()

    def __init__(self, documents):
        self.splits = {"train": documents}


def by_definition(train: Documents, scored: Documents, order: int) -> float:
    followers = defaultdict(Counter)
    for text in train.texts:
        for index, base in enumerate("^" + text):
            for length in range(min(order, index) + 1 if index else 0):
                followers[("^" + text)[index - length : index]][base] += 1

    def probability(context: str, base: str) -> float:
        lower = probability(context[1:], base) if context else 1 / 257
        found = followers[context]
        return (found[base] + len(found) * lower) / (found.total() + len(found)) if found else lower

    bits = 0.0
    for text in scored.texts:
        for index in range(1, len(text) + 1):
            bits -= math.log2(probability(("^" + text)[max(0, index - order) : index], text[index - 1]))
    return bits / scored.total_bytes


@pytest.mark.parametrize("in_an_array", [0, 1 << 24])
def test_markov_models_are_as_defined(in_an_array, monkeypatch):
    monkeypatch.setattr("data.baselines.COUNTED_IN_AN_ARRAY", in_an_array)
    train, scored = Documents(1, (50, 3, 200)), Documents(2, (40, 1, 60), letters="ACGTNR")
    measured = markov_bits_per_byte(TrainedOn(train), scored, 5)
    assert measured == pytest.approx([by_definition(train, scored, order) for order in range(6)], rel=1e-9)


def test_order_two_learns_what_order_one_cannot():
    train, scored = Documents(1, [3000]), Documents(2, [500])
    entropy = -(0.925 * math.log2(0.925) + 0.075 * math.log2(0.025))
    assert symbols_of(TrainedOn(train)) == 4
    _, first, second = markov_bits_per_byte(TrainedOn(train), scored, 2)
    assert first > 1.9
    assert second == pytest.approx(entropy, abs=0.15)


def test_a_seasonal_naive_forecast_repeats_the_last_period():
    history = np.array([9.0, 1, 2, 3])
    assert seasonal_naive(history, 7, 3).tolist() == [1, 2, 3, 1, 2, 3, 1]
    assert seasonal_naive(history, 2, 3).tolist() == [1, 2]

"""Baselines that every model must beat: gzip, a bigram model, and for texts of few symbols (DNA) a Markov model.

These are measured as models are: in bits per byte, on each document alone, from its start. The baseline of forecasts of
series is the seasonal-naive forecast.
"""

import gzip
import math

import numpy as np

from .corpus import Corpus, Split
from .in_memory import InMemoryDocuments

MARKOV_ORDER = 9  # the highest order that is tried for texts of few symbols
MARKOV_SYMBOLS = 16  # the most different tokens of such a text

COUNTED_IN_AN_ARRAY = 1 << 24  # different pairs of context and token; more are counted by sorting
COUNTED_TOKENS = 50_000_000  # a model counts at most this many training tokens: more hardly change it


def gzip_bits_per_byte(documents: Split | InMemoryDocuments) -> float:
    """Returns the bits per byte of `gzip -9`, which compresses each document alone."""
    compressed = sum(len(gzip.compress(documents.raw(document), 9)) for document in range(len(documents)))
    return 8 * compressed / documents.total_bytes


def bigram_bits_per_byte(corpus: Corpus, documents: Split | InMemoryDocuments) -> float:
    """Returns the bits per byte of a bigram model of tokens: `markov_bits_per_byte` of order 1."""
    return markov_bits_per_byte(corpus, documents, 1)[1]


def markov_bits_per_byte(corpus: Corpus, documents: Split | InMemoryDocuments, order: int) -> list[float]:
    """Returns the bits per byte of Markov models of tokens, of orders 0 to `order`, counted on the training split of
    `corpus`.

    A model is scored on every token of `documents` but bos. Its contexts are as many tokens before as its order, bos
    included, within the document. Each order is interpolated with the next lower one, and order 0 with the uniform
    distribution, by Witten and Bell's rule (1991): the more different tokens followed a context, the more probability
    remains for others.
    """
    vocabulary, bos = corpus.tokenizer.vocabulary, corpus.tokenizer.bos
    train, scored = corpus.splits["train"].head(COUNTED_TOKENS), documents.flat
    present = np.bincount(train, minlength=vocabulary) > 0
    # Consecutive numbers keep contexts below 64 bits. All tokens that training lacks have one: their counts are 0.
    symbols = int(present.sum()) + 1
    assert symbols ** (order + 1) < 1 << 63
    number = np.where(present, np.cumsum(present) - 1, symbols - 1)
    train, scored = number[train], number[scored]
    place_in_train, place = _places(train, number[bos]), _places(scored, number[bos])

    train_context, context = np.zeros_like(train), np.zeros_like(scored)
    probability, bits = np.full(len(scored), 1 / vocabulary), []
    for length in range(order + 1):
        if length:
            train_context[length:] += train[:-length] * symbols ** (length - 1)
            context[length:] += scored[:-length] * symbols ** (length - 1)
        counted = place_in_train >= max(length, 1)
        pairs, count = _counts((train_context * symbols + train)[counted], symbols ** (length + 1))
        contexts, first = np.unique(pairs // symbols, return_index=True)
        after = np.add.reduceat(count, first)  # how often any token followed each context
        followers = np.diff(first, append=len(pairs))  # and how many different ones did

        chosen = np.flatnonzero(place >= max(length, 1))
        found, at = _find(contexts, context[chosen])
        chosen, at = chosen[found], at[found]
        followed, pair = _find(pairs, context[chosen] * symbols + scored[chosen])
        times = np.where(followed, count[pair], 0)
        probability[chosen] = (times + followers[at] * probability[chosen]) / (after[at] + followers[at])
        nats = -np.log(probability[place > 0]).sum()
        bits.append(float(nats / math.log(2) / documents.total_bytes))
    return bits


def seasonal_naive(history: np.ndarray, horizon: int, period: int) -> np.ndarray:
    """Returns the forecast of the next `horizon` values, `[horizon]`, that repeats the last `period` values of
    `history`, which has at least `period` values."""
    assert len(history) >= period
    return np.resize(history[-period:], horizon)


def symbols_of(corpus: Corpus) -> int:
    """Returns the number of different tokens in the training split, without bos."""
    return np.count_nonzero(np.bincount(corpus.splits["train"].head(COUNTED_TOKENS))) - 1


def _places(tokens: np.ndarray, bos: int) -> np.ndarray:
    """Returns the place of each token in its document; that of bos is 0."""
    index = np.arange(len(tokens))
    return index - np.maximum.accumulate(np.where(tokens == bos, index, 0))


def _counts(values: np.ndarray, bound: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the different values, sorted, and how often each occurs. `bound`: all values are less."""
    if bound > COUNTED_IN_AN_ARRAY:
        return np.unique(values, return_counts=True)
    count = np.bincount(values)
    different = np.flatnonzero(count)
    return different, count[different]


def _find(values: np.ndarray, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns whether each wanted value is among the sorted `values`, and its index (any index if it is not)."""
    index = np.minimum(np.searchsorted(values, wanted), len(values) - 1)
    return values[index] == wanted, index

"""Baselines that every model must beat: gzip and a bigram model.

Both are measured as models are: in bits per byte, on each document alone, from its start.
"""

import gzip
import math

import numpy as np

from .corpus import Corpus, Split
from .in_memory import InMemoryDocuments

COUNTED_TOKENS = 50_000_000  # the bigram model counts at most this many training tokens: more hardly change it


def gzip_bits_per_byte(documents: Split | InMemoryDocuments) -> float:
    """Returns the bits per byte of `gzip -9`, which compresses each document alone."""
    compressed = sum(len(gzip.compress(documents.text(document).encode(), 9)) for document in range(len(documents)))
    return 8 * compressed / documents.total_bytes


def bigram_bits_per_byte(corpus: Corpus, documents: Split | InMemoryDocuments) -> float:
    """Returns the bits per byte of a bigram model of tokens, counted on the training split of `corpus`.

    It is scored on every token of `documents` but bos. Bigrams are interpolated with unigrams, and unigrams with the
    uniform distribution, by Witten and Bell's rule (1991): the more different tokens followed a token, the more
    probability remains for others.
    """
    vocabulary, bos = corpus.tokenizer.vocabulary, corpus.tokenizer.bos
    train = corpus.splits["train"].flat[:COUNTED_TOKENS]
    previous, token = _pairs(train, bos)

    count = np.bincount(token, minlength=vocabulary)
    seen = np.count_nonzero(count)
    unigram = (count + seen / vocabulary) / (count.sum() + seen)

    pairs, pair_count = np.unique(previous * vocabulary + token, return_counts=True)
    after = np.bincount(previous, minlength=vocabulary)  # how often any token followed each token
    followers = np.bincount(pairs // vocabulary, minlength=vocabulary)  # and how many different ones did

    previous, token = _pairs(documents.flat, bos)
    wanted = previous * vocabulary + token
    place = np.minimum(np.searchsorted(pairs, wanted), len(pairs) - 1)
    counted = np.where(pairs[place] == wanted, pair_count[place], 0)
    total = after[previous] + followers[previous]
    probability = np.where(
        total > 0, (counted + followers[previous] * unigram[token]) / np.maximum(total, 1), unigram[token]
    )
    nats = -np.log(probability).sum()
    return float(nats / math.log(2) / documents.total_bytes)


def _pairs(tokens: np.ndarray, bos: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns (previous, token), both int64 `[pairs]`, for each token but bos. A document's first token follows bos."""
    tokens = tokens.astype(np.int64)
    inside = tokens[1:] != bos
    return tokens[:-1][inside], tokens[1:][inside]

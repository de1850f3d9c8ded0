"""What a model must beat: a compressor that everybody has, and a model that only counts.

Both are measured on the bytes that a model is scored on, in bits per byte: every document from its start, alone.
"""

import gzip
import math

import numpy as np

from .corpus import Corpus, Split
from .texts import Texts

COUNTED_TOKENS = 50_000_000  # of training text, at most: the bigram counts of more hardly change


def gzip_bits_per_byte(documents: Split | Texts) -> float:
    """`gzip -9` of each document."""
    compressed = sum(len(gzip.compress(documents.text(document).encode(), 9)) for document in range(len(documents)))
    return 8 * compressed / documents.total_bytes


def bigram_bits_per_byte(corpus: Corpus, documents: Split | Texts) -> float:
    """A bigram model over the corpus's own tokens, counted on train, scored on every token of `documents` but bos.

    Interpolated with the unigram model by Witten and Bell's rule (1991): a token followed by many different ones leaves
    more room for new ones. The unigrams in turn are interpolated with the uniform distribution in the same way.
    """
    vocabulary, bos = corpus.tokenizer.vocabulary, corpus.tokenizer.bos
    train = corpus.splits["train"].flat[:COUNTED_TOKENS]
    previous, token = _pairs(train, bos)

    count = np.bincount(token, minlength=vocabulary)
    seen = np.count_nonzero(count)
    unigram = (count + seen / vocabulary) / (count.sum() + seen)

    pairs, pair_count = np.unique(previous * vocabulary + token, return_counts=True)
    after = np.bincount(previous, minlength=vocabulary)  # how often each token was followed by one
    followers = np.bincount(pairs // vocabulary, minlength=vocabulary)  # and by how many different ones

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
    """Each token but bos with the one before it, both int64; bos comes before a document's first token."""
    tokens = tokens.astype(np.int64)
    inside = tokens[1:] != bos
    return tokens[:-1][inside], tokens[1:][inside]

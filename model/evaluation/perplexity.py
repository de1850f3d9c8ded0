"""From token losses to perplexity and bits per byte of held-out documents, in total and by position in the document.
Sums of nats are float64.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise

import numpy as np

from model.evaluation.comparison import bits_per_byte
from model.evaluation.documents import Documents
from model.evaluation.protocol import Protocol
from model.evaluation.statistics import document_bounds, mean_and_bounds

EDGES = (0, *(2**i for i in range(9, 31)))
"""Edges of the position buckets: [0, 512), [512, 1024), [1024, 2048), ..."""

FIRST = 512
"""First tokens of a document, whose loss is compared with that of its last quarter."""

TRAILING = 2048
"""Last tokens of a document, whose loss `Trailing` holds."""


@dataclass(frozen=True)
class Bucket:
    """Loss (nats per token) of the tokens at positions `[start, stop)` of their documents. `low` and `high` are its
    95 % bounds over documents (statistics.document_bounds), null if only one document reaches the bucket."""

    start: int
    stop: int
    documents: int
    tokens: int
    loss: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Trailing:
    """Loss of the last TRAILING tokens of every document that is long enough; bounds as in a Bucket."""

    documents: int
    tokens: int
    loss: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class ByDocument:
    """The terms of each document, in the order of the documents, from which reports compute paired differences.
    `tokens`: those that were scored."""

    nats: list[float]
    bytes: list[int]
    tokens: list[int]


@dataclass(frozen=True)
class Evaluation:
    """One row of evaluation.json. `low` and `high` are 95 % bounds over documents, null for one document.

    `word_perplexity` is exp(nats / words of the text), which does not depend on the tokenizer (as for PG-19, Rae et al.
    2019); it is null where each document is one word, as a genome or a series is. `loss_first_512` and
    `loss_last_quarter` are means over long documents alone; `trailing` is null if no document is long enough. Bits per
    byte are null where losses are given per token alone.
    """

    protocol: dict[str, object]
    documents: int
    bytes: int
    words: int
    tokens_scored: int
    nll_nats: float
    loss: float
    loss_low: float | None
    loss_high: float | None
    perplexity: float
    word_perplexity: float | None
    bits_per_byte: float | None
    bits_per_byte_low: float | None
    bits_per_byte_high: float | None
    loss_first_512: float | None
    loss_last_quarter: float | None
    trailing: Trailing | None
    by_position: list[Bucket]
    by_document: ByDocument

    def to_dict(self) -> dict[str, object]:
        return asdict(self)


def summarize(
    losses: list[np.ndarray], documents: Documents, protocol: Protocol, *, long_document: int, per_byte: bool = True
) -> Evaluation:
    """Returns the row of evaluation.json.

    Args:
        losses: token losses (nats, float64) of each document, from scoring.token_losses.
        long_document: least number of tokens of a document that counts for `loss_first_512` and `loss_last_quarter`.
        per_byte: whether the row has bits per byte.
    """
    nats = np.array([loss.sum() for loss in losses])
    tokens = np.array([len(loss) for loss in losses])
    sizes, words = np.array(documents.bytes), sum(map(int, documents.words))
    total, scored, size = float(nats.sum()), int(tokens.sum()), int(sizes.sum())
    long = [loss for loss in losses if len(loss) >= max(long_document, 2 * FIRST)]
    first = np.concatenate([loss[:FIRST] for loss in long]) if long else None
    last = np.concatenate([loss[-(len(loss) // 4) :] for loss in long]) if long else None
    bits, bits_low, bits_high = bits_per_byte(nats, sizes if per_byte else 0 * sizes)
    loss_low, loss_high = document_bounds(nats, tokens)
    return Evaluation(
        protocol=protocol.describe(),
        documents=len(losses),
        bytes=size,
        words=words,
        tokens_scored=scored,
        nll_nats=total,
        loss=total / scored,
        loss_low=loss_low,
        loss_high=loss_high,
        perplexity=perplexity(total, scored),
        word_perplexity=perplexity(total, words) if words > len(losses) else None,
        bits_per_byte=bits,
        bits_per_byte_low=bits_low,
        bits_per_byte_high=bits_high,
        loss_first_512=float(first.mean()) if long else None,
        loss_last_quarter=float(last.mean()) if long else None,
        trailing=_trailing(losses),
        by_position=list(_buckets(losses)),
        by_document=ByDocument(nats.tolist(), sizes.tolist(), tokens.tolist()),
    )


def summarize_sources(
    losses: list[np.ndarray],
    documents: Documents,
    names: Sequence[str],
    sources: Sequence[str],
    *,
    per_byte: bool = True,
) -> dict[str, dict[str, float | None]]:
    """Returns the counts, loss and bits per byte, with their bounds, of each source of a mixture that has documents.

    Args:
        losses: token losses (nats, float64) of each document.
        names: of the documents; each begins with the name of its source and a slash.
        per_byte: as of `summarize`.
    """
    of_document = np.array([name.partition("/")[0] for name in names])
    nats = np.array([loss.sum() for loss in losses])
    tokens = np.array([len(loss) for loss in losses])
    sizes = np.array(documents.bytes)
    found = {}
    for source in sources:
        own = of_document == source
        if not own.any():
            continue
        bits, low, high = bits_per_byte(nats[own], sizes[own] if per_byte else 0 * sizes[own])
        found[source] = {
            "documents": int(own.sum()),
            "bytes": int(sizes[own].sum()),
            "tokens_scored": int(tokens[own].sum()),
            "loss": float(nats[own].sum() / tokens[own].sum()),
            "bits_per_byte": bits,
            "bits_per_byte_low": low,
            "bits_per_byte_high": high,
        }
    return found


def perplexity(nats: float, count: int) -> float:
    """Returns exp(nats / count), with the exponent limited to 700 so that the result is finite."""
    return math.exp(min(nats / count, 700.0))


def _buckets(losses: list[np.ndarray]) -> Iterator[Bucket]:
    for start, stop in pairwise(EDGES):
        reached = [loss[start:stop] for loss in losses if len(loss) > start]
        if not reached:
            return
        yield Bucket(start, stop, len(reached), sum(map(len, reached)), *mean_and_bounds(reached))


def _trailing(losses: list[np.ndarray]) -> Trailing | None:
    ends = [loss[-TRAILING:] for loss in losses if len(loss) >= TRAILING]
    return Trailing(len(ends), TRAILING * len(ends), *mean_and_bounds(ends)) if ends else None

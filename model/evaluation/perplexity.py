"""Perplexity and bits per byte of held-out documents, as a whole and by position within the document.

Every token of a document's text is scored once: a document is [bos] + tokens, and bos itself is never predicted. Sums
of nats are float64. Segments of many documents are packed into one sequence, where the layout keeps them apart.
"""

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Protocol as Interface

import numpy as np
import torch

from model.evaluation.protocol import Protocol, Segment
from model.transformer import Transformer

log = logging.getLogger(__name__)

EDGES = (0, *(2**i for i in range(9, 31)))
"""Edges of the position buckets: [0, 512), [512, 1024), [1024, 2048), ..."""

FIRST = 512
"""Tokens at the beginning of a document against which its last quarter is held."""

RESAMPLES = 1000


class Documents(Interface):
    """What can be evaluated: data.corpus.Split is one."""

    bytes: Sequence[int]

    def __len__(self) -> int: ...

    def tokens(self, document: int) -> np.ndarray: ...


@dataclass(frozen=True)
class Bucket:
    """Loss (nats a token) of the tokens at positions `[start, stop)` of their documents; `low` and `high` bound its
    mean over documents with 95 % confidence (bootstrap over documents; equal where one document reaches the bucket)."""

    start: int
    stop: int
    tokens: int
    loss: float
    low: float
    high: float


@dataclass(frozen=True)
class Evaluation:
    """One row of evaluation.json. `loss_first_512` and `loss_last_quarter` are over the long documents alone."""

    protocol: dict[str, object]
    documents: int
    bytes: int
    tokens_scored: int
    nll_nats: float
    loss: float
    perplexity: float
    bits_per_byte: float
    loss_first_512: float | None
    loss_last_quarter: float | None
    by_position: list[Bucket]

    def to_dict(self) -> dict[str, object]:
        return asdict(self)


@torch.no_grad()
def evaluate(
    model: Transformer,
    documents: Documents,
    protocol: Protocol,
    *,
    tokens_at_once: int,
    long_document: int,
    progress: Callable[[int], None] = lambda tokens: None,
) -> Evaluation:
    """Scores every document under `protocol`.

    `tokens_at_once`: segments are packed into sequences of at most so many tokens (a longer segment goes alone).
    `long_document`: tokens from which on a document counts for `first_512` against `last_quarter`.
    `progress` is told how many tokens were scored. Raises ValueError where the model cannot take the protocol's window.
    """
    longest = max(
        (s.stop - s.start for d in range(len(documents)) for s in protocol.segments(len(documents.tokens(d)))),
        default=0,
    )
    if longest > model.config.max_length:
        raise ValueError(
            f"protocol.name={protocol.name} needs sequences of {longest} tokens: the model takes "
            f"{model.config.max_length}; try protocol.name=sliding"
        )
    if not longest:
        raise ValueError("no document has a token to score")
    losses = [np.zeros(max(len(documents.tokens(d)) - 1, 0)) for d in range(len(documents))]
    counted = [np.zeros(len(loss), dtype=np.int64) for loss in losses]
    training = model.training
    model.eval()
    # Batches differ in length: a compiled model would be compiled anew for each.
    with torch.compiler.set_stance("force_eager"):
        for batch in _batches(documents, protocol, tokens_at_once):
            for document, segment, nats in _score(model, documents, batch):
                losses[document][segment.scored - 1 : segment.stop] = nats
                counted[document][segment.scored - 1 : segment.stop] += 1
            progress(sum(segment.stop - segment.scored + 1 for _, segment in batch))
    model.train(training)
    assert all((count == 1).all() for count in counted), "a token was not scored exactly once"
    return summarize(losses, [int(n) for n in documents.bytes], protocol, long_document)


def summarize(losses: list[np.ndarray], sizes: list[int], protocol: Protocol, long_document: int) -> Evaluation:
    """The row of evaluation.json from each document's token losses (nats, float64) and its size in bytes."""
    nats = float(sum(loss.sum() for loss in losses))
    tokens, size = sum(map(len, losses)), sum(sizes)
    long = [loss for loss in losses if len(loss) >= max(long_document, 2 * FIRST)]
    first = np.concatenate([loss[:FIRST] for loss in long]) if long else None
    last = np.concatenate([loss[-(len(loss) // 4) :] for loss in long]) if long else None
    return Evaluation(
        protocol=protocol.describe(),
        documents=len(losses),
        bytes=size,
        tokens_scored=tokens,
        nll_nats=nats,
        loss=nats / tokens,
        perplexity=math.exp(min(nats / tokens, 700.0)),
        bits_per_byte=nats / math.log(2) / size,
        loss_first_512=float(first.mean()) if long else None,
        loss_last_quarter=float(last.mean()) if long else None,
        by_position=list(_buckets(losses)),
    )


def _buckets(losses: list[np.ndarray]) -> Iterator[Bucket]:
    generator = np.random.default_rng(0)
    for start, stop in pairwise(EDGES):
        reached = [loss[start:stop] for loss in losses if len(loss) > start]
        if not reached:
            return
        nats, tokens = np.array([part.sum() for part in reached]), np.array([len(part) for part in reached])
        drawn = generator.integers(len(reached), size=(RESAMPLES, len(reached)))
        means = nats[drawn].sum(1) / tokens[drawn].sum(1)
        low, high = np.quantile(means, [0.025, 0.975])
        yield Bucket(start, stop, int(tokens.sum()), float(nats.sum() / tokens.sum()), float(low), float(high))


Batch = list[tuple[int, Segment]]


def _batches(documents: Documents, protocol: Protocol, tokens_at_once: int) -> Iterator[Batch]:
    """Segments in order, as many at once as fit."""
    batch: Batch = []
    size = 0
    for document in range(len(documents)):
        for segment in protocol.segments(len(documents.tokens(document))):
            length = segment.stop - segment.start
            if batch and size + length > tokens_at_once:
                yield batch
                batch, size = [], 0
            batch.append((document, segment))
            size += length
    if batch:
        yield batch


def _score(model: Transformer, documents: Documents, batch: Batch) -> Iterator[tuple[int, Segment, np.ndarray]]:
    """(document, segment, nats of its scored tokens) of one packed sequence."""
    device = model.embed_tokens.weight.device
    pieces = [documents.tokens(document)[s.start : s.stop + 1].astype(np.int64) for document, s in batch]
    sizes = [len(piece) - 1 for piece in pieces]
    tokens, targets = (np.concatenate(part) for part in ([p[:-1] for p in pieces], [p[1:] for p in pieces]))
    position = np.concatenate([np.arange(size) for size in sizes])
    document = np.repeat(np.arange(len(sizes)), sizes)
    tokens, targets, position, document = (
        torch.from_numpy(x)[None].to(device) for x in (tokens, targets, position, document)
    )
    layouts = model.build_layouts(document if len(sizes) > 1 else None, tokens.shape[1])
    per_token = model.loss(tokens, targets, position, layouts).per_token[0].double().cpu().numpy()
    for (index, segment), nats in zip(batch, np.split(per_token, np.cumsum(sizes)[:-1]), strict=True):
        yield index, segment, nats[segment.scored - 1 - segment.start :]

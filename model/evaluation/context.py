"""The loss of the same tokens with shorter and longer context: given 512, 1,024, ... tokens before them.

A loss that falls with position can mean that later tokens are easier, or that context helps. Here the scored tokens
stay the same, and only the tokens before them are cut.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from model.evaluation.documents import Documents
from model.evaluation.loss_store import LossStore
from model.evaluation.protocol import Segment
from model.evaluation.scoring import Progress, score_segments
from model.evaluation.statistics import mean_and_bounds
from model.transformer import Transformer

WHOLE = "whole"
"""The context that starts at the beginning of the document."""

SHORTEST = 512
"""Tokens of the shortest context where no contexts are given."""


@dataclass(frozen=True)
class ContextLoss:
    """Loss (nats per token) of the scored tokens. At each place, the first of them is given `context` tokens.
    `low` and `high` are bounds as in perplexity.Bucket.

    `change` is the loss minus that of the context before it in the list, and `gain` that of the first context minus the
    loss, each with the bounds of this paired difference; null for the first context.
    """

    context: int | str
    documents: int
    tokens: int
    loss: float
    low: float | None
    high: float | None
    change: float | None = None
    change_low: float | None = None
    change_high: float | None = None
    gain: float | None = None
    gain_low: float | None = None
    gain_high: float | None = None


def default_contexts(length: int, targets: int) -> list[int]:
    """Returns SHORTEST, twice that, ... and the longest context of a model that was trained on sequences of `length`
    tokens; [] where SHORTEST is too long for it."""
    longest = length - targets
    doubled = [SHORTEST << doubling for doubling in range(length.bit_length()) if SHORTEST << doubling < longest]
    return [*doubled, longest] if longest >= SHORTEST else []


def least_tokens(contexts: Sequence[int | str], targets: int) -> int:
    """Returns the tokens of the shortest document that every one of `contexts` fits into."""
    return max((context for context in contexts if context != WHOLE), default=1) + targets


def context_work(
    documents: Documents, contexts: Sequence[int | str], targets: int, places: int, least: int | None = None
) -> list[tuple[int | str, int, Segment]]:
    """Returns (context, document, segment) of all segments to score, on documents of at least `least` tokens.

    The last place of a document is its end. The others are spread evenly before it, behind the tokens of the longest
    context, as many as do not overlap.
    """
    least = least or least_tokens(contexts, targets)
    lengths = {document: len(documents.tokens(document)) for document in range(len(documents))}
    work = []
    for context in contexts:
        for document, length in lengths.items():
            if length < least:
                continue
            count = min(places, 1 + (length - least) // targets)
            for first in np.linspace(length - targets, least - targets, count, dtype=int).tolist()[::-1]:
                start = 0 if context == WHOLE else first - context
                work.append((context, document, Segment(start, first + targets - 1, first)))
    return work


def losses_by_context(
    model: Transformer,
    documents: Documents,
    contexts: Sequence[int | str],
    targets: int,
    *,
    tokens_at_once: int,
    places: int = 1,
    least: int | None = None,
    store: LossStore | None = None,
    progress: Progress = lambda tokens: None,
) -> list[ContextLoss]:
    """Returns the loss of `targets` tokens at each place of every document that is long enough, under each of
    `contexts`; [] if no document is.

    Args:
        contexts: numbers of tokens before the first target (each at least 1), or WHOLE.
        places: the most places of a document; see `context_work`. One place is the end.
        least: tokens of the shortest document that is scored, under every context; by default `least_tokens`. Models
            that are compared under different contexts need the same one, so that they score the same tokens.
        tokens_at_once, store, progress: as for scoring.token_losses.

    Raises:
        ValueError: a context exceeds the model's limit.
    """
    work = context_work(documents, contexts, targets, places, least)
    longest = max((segment.stop - segment.start for _, _, segment in work), default=0)
    if longest > model.config.max_length:
        raise ValueError(
            f"by_context.contexts={list(contexts)} needs sequences of {longest} tokens: the model takes "
            f"{model.config.max_length}"
        )
    found: dict[tuple[int | str, int, int], np.ndarray] = {}
    name = lambda context, document, first: f"context_{context}_{targets}_{document:06d}_{first}"  # noqa: E731
    for context, document, segment in work:
        kept = store.load(name(context, document, segment.scored)) if store else None
        if kept is not None:
            found[context, document, segment.scored] = kept
            progress(targets)
    for context in contexts:
        left = [(d, segment) for c, d, segment in work if c == context and (c, d, segment.scored) not in found]
        for document, segment, nats in score_segments(model, documents, left, tokens_at_once, progress):
            found[context, document, segment.scored] = nats
            if store:
                store.save(name(context, document, segment.scored), nats)
    if not work:
        return []
    by_document: dict[int | str, dict[int, list[np.ndarray]]] = {context: {} for context in contexts}
    for context, document, segment in work:
        by_document[context].setdefault(document, []).append(found[context, document, segment.scored])
    losses = {context: list(map(np.concatenate, each.values())) for context, each in by_document.items()}
    rows = []
    for number, context in enumerate(contexts):
        scored, paired = losses[context], ()
        if number:
            paired = _difference(scored, losses[contexts[number - 1]]) + _difference(losses[contexts[0]], scored)
        rows.append(ContextLoss(context, len(scored), sum(map(len, scored)), *mean_and_bounds(scored), *paired))
    return rows


def _difference(losses: Sequence[np.ndarray], others: Sequence[np.ndarray]) -> tuple[float, float | None, float | None]:
    """Returns the mean of the paired difference, and its bounds over documents."""
    return mean_and_bounds([loss - other for loss, other in zip(losses, others, strict=True)])

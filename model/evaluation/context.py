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
    """Loss (nats per token) of the last tokens of the documents. The first of these tokens is given `context` tokens.
    `low` and `high` are bounds as in perplexity.Bucket.

    `change` is the loss minus that of the context before it in the list, with the bounds of this paired difference;
    null for the first context.
    """

    context: int | str
    documents: int
    tokens: int
    loss: float
    low: float
    high: float
    change: float | None = None
    change_low: float | None = None
    change_high: float | None = None


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
    documents: Documents, contexts: Sequence[int | str], targets: int, least: int | None = None
) -> list[tuple[int | str, int, Segment]]:
    """Returns (context, document, segment) of all segments to score, on documents of at least `least` tokens."""
    least = least or least_tokens(contexts, targets)
    chosen = [document for document in range(len(documents)) if len(documents.tokens(document)) >= least]
    work = []
    for context in contexts:
        for document in chosen:
            length = len(documents.tokens(document))
            first = length - targets
            work.append((context, document, Segment(0 if context == WHOLE else first - context, length - 1, first)))
    return work


def losses_by_context(
    model: Transformer,
    documents: Documents,
    contexts: Sequence[int | str],
    targets: int,
    *,
    tokens_at_once: int,
    least: int | None = None,
    store: LossStore | None = None,
    progress: Progress = lambda tokens: None,
) -> list[ContextLoss]:
    """Returns the loss of the last `targets` tokens of every document that is long enough, under each of `contexts`; []
    if no document is.

    Args:
        contexts: numbers of tokens before the first target (each at least 1), or WHOLE.
        least: tokens of the shortest document that is scored, under every context; by default `least_tokens`. Models
            that are compared under different contexts need the same one, so that they score the same tokens.
        tokens_at_once, store, progress: as for scoring.token_losses.

    Raises:
        ValueError: a context exceeds the model's limit.
    """
    work = context_work(documents, contexts, targets, least)
    longest = max((segment.stop - segment.start for _, _, segment in work), default=0)
    if longest > model.config.max_length:
        raise ValueError(
            f"by_context.contexts={list(contexts)} needs sequences of {longest} tokens: the model takes "
            f"{model.config.max_length}"
        )
    found: dict[tuple[int | str, int], np.ndarray] = {}
    for context, document, _ in work:
        kept = store.load(f"context_{context}_{targets}_{document:06d}") if store else None
        if kept is not None:
            found[context, document] = kept
            progress(targets)
    for context in contexts:
        left = [(document, segment) for c, document, segment in work if c == context and (c, document) not in found]
        for document, _, nats in score_segments(model, documents, left, tokens_at_once, progress):
            found[context, document] = nats
            if store:
                store.save(f"context_{context}_{targets}_{document:06d}", nats)
    chosen = list(dict.fromkeys(document for _, document, _ in work))
    if not chosen:
        return []
    rows = []
    for number, context in enumerate(contexts):
        losses = [found[context, document] for document in chosen]
        change: tuple[float, ...] = ()
        if number:
            before = [found[contexts[number - 1], document] for document in chosen]
            change = mean_and_bounds([loss - shorter for loss, shorter in zip(losses, before, strict=True)])
        rows.append(ContextLoss(context, len(chosen), targets * len(chosen), *mean_and_bounds(losses), *change))
    return rows

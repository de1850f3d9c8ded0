"""LongPPL: the loss on key tokens, those whose loss long context lowers (Fang et al. 2024).

An evaluator model scores every token with long and with short context. A token is a key token if the long context
lowers its loss by more than `gain` nats (the paper's long-short difference), and its log-likelihood with long context
is above `confidence` (the paper's long-context likelihood): a token that stays improbable is not in the context.
"""

from dataclasses import dataclass

import numpy as np

from model.evaluation.perplexity import perplexity
from model.evaluation.protocol import Protocol
from model.evaluation.statistics import document_bounds


@dataclass(frozen=True)
class KeyTokens:
    """The loss (nats) and perplexity (the paper's LongPPL) on key tokens, with bounds over the documents that have any.
    The numbers are null if there is no key token."""

    tokens: int
    documents: int
    loss: float | None
    low: float | None
    high: float | None
    perplexity: float | None


def short_protocol(short_context: int) -> Protocol:
    """Returns the evaluator's protocol for short context: a token sees at most `short_context` tokens and, after the
    first window, at least three quarters of that."""
    return Protocol("sliding", short_context, max(1, short_context // 4))


def find_key_tokens(
    long: list[np.ndarray], short: list[np.ndarray], *, gain: float, confidence: float
) -> list[np.ndarray]:
    """Returns which tokens are key tokens: one boolean array per document.

    Args:
        long, short: the evaluator's token losses (nats) with long and short context, one array per document.
        gain: nats, > 0.
        confidence: log-likelihood, <= 0.
    """
    return [
        (with_less - with_more > gain) & (-with_more > confidence)
        for with_more, with_less in zip(long, short, strict=True)
    ]


def summarize_key_tokens(losses: list[np.ndarray], chosen: list[np.ndarray]) -> KeyTokens:
    """Returns the loss of a model on key tokens, from its token losses and the result of `find_key_tokens`."""
    kept = [loss[where] for loss, where in zip(losses, chosen, strict=True) if where.any()]
    if not kept:
        return KeyTokens(0, 0, None, None, None, None)
    nats, tokens = np.array([loss.sum() for loss in kept]), np.array([len(loss) for loss in kept])
    total, count = float(nats.sum()), int(tokens.sum())
    return KeyTokens(count, len(kept), total / count, *document_bounds(nats, tokens), perplexity(total, count))

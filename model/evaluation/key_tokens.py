"""LongPPL: the loss on those tokens alone that long context helps (Fang et al. 2024).

An evaluator model scores every token with long and with short context. A token is a key token where the long context
lowers its loss by more than `gain` nats (the paper's long-short difference) and leaves it at log-likelihood above
`confidence` (its long-context likelihood): what is then still improbable was not in the context after all.
"""

from dataclasses import dataclass

import numpy as np

from model.evaluation.perplexity import perplexity
from model.evaluation.protocol import Protocol
from model.evaluation.statistics import bootstrap


@dataclass(frozen=True)
class KeyTokens:
    """The loss (nats) and perplexity (the paper's LongPPL) on key tokens; bounds over the documents that have any.
    Null where there is no key token."""

    tokens: int
    documents: int
    loss: float | None
    low: float | None
    high: float | None
    perplexity: float | None


def short_protocol(short_context: int) -> Protocol:
    """How the evaluator scores with short context: every token sees `short_context` tokens at most and, from there on,
    three quarters of that at least."""
    return Protocol("sliding", short_context, max(1, short_context // 4))


def find_key_tokens(
    long: list[np.ndarray], short: list[np.ndarray], *, gain: float, confidence: float
) -> list[np.ndarray]:
    """Which tokens are key tokens: booleans like `long` and `short`, the evaluator's token losses (nats), one array a
    document. `gain` > 0 nats; `confidence`: log-likelihood, <= 0."""
    return [
        (with_less - with_more > gain) & (-with_more > confidence)
        for with_more, with_less in zip(long, short, strict=True)
    ]


def summarize_key_tokens(losses: list[np.ndarray], chosen: list[np.ndarray]) -> KeyTokens:
    """The loss of a model, from its token losses, on the tokens that `find_key_tokens` chose."""
    kept = [loss[where] for loss, where in zip(losses, chosen, strict=True) if where.any()]
    if not kept:
        return KeyTokens(0, 0, None, None, None, None)
    nats, tokens = np.array([loss.sum() for loss in kept]), np.array([len(loss) for loss in kept])
    total, count = float(nats.sum()), int(tokens.sum())
    return KeyTokens(count, len(kept), total / count, *bootstrap(nats, tokens), perplexity(total, count))

"""The paired difference of two runs on the same documents, which varies far less than the difference of two means."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from model.evaluation.statistics import document_bounds


@dataclass(frozen=True)
class Difference:
    """One run minus another; negative if the first is better. `low` and `high` are 95 % bounds over documents
    (statistics.document_bounds of each document's difference), null for one document. The loss (nats per token) is null
    if the runs' tokenizers differ; bits per byte are null where losses are given per token alone."""

    loss: float | None
    loss_low: float | None
    loss_high: float | None
    bits_per_byte: float | None
    bits_per_byte_low: float | None
    bits_per_byte_high: float | None
    documents: int
    documents_better: int


def compare(run: list[np.ndarray], against: list[np.ndarray], sizes: Sequence[int], *, same_tokens: bool) -> Difference:
    """Returns run minus against.

    Args:
        run, against: token losses (nats) of the same documents, in the same order.
        sizes: bytes of each document; all 0 where losses are given per token alone.
        same_tokens: whether both runs have the same tokenizer.
    """
    nats = np.array([a.sum() - b.sum() for a, b in zip(run, against, strict=True)])
    bits = bits_per_byte(nats, np.array(sizes))
    loss: list[float | None] = [None] * 3
    if same_tokens:
        tokens = np.array([len(a) for a in run])
        assert tokens.tolist() == [len(b) for b in against], "the runs were scored on different tokens"
        loss = list(per_token(nats, tokens))
    return Difference(*loss, *bits, len(nats), int((nats < 0).sum()))


def bits_per_byte(nats: np.ndarray, sizes: np.ndarray) -> tuple[float | None, float | None, float | None]:
    """Returns the mean and its bounds (None for one document); three None for documents without bytes.

    nats: `[documents]`, of one run, or of one minus another. sizes: their bytes.
    """
    if not sizes.sum():
        return None, None, None
    bits = nats / math.log(2)
    return (float(bits.sum() / sizes.sum()), *document_bounds(bits, sizes))


def per_token(nats: np.ndarray, tokens: np.ndarray) -> tuple[float, float | None, float | None]:
    """Returns the mean of nats over tokens, `[documents]` each, and its bounds (None for one document)."""
    return (float(nats.sum() / tokens.sum()), *document_bounds(nats, tokens))

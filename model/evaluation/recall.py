"""Exact match of answers under greedy decoding, and the loss of the right answer, from one forward pass.

Greedy decoding gives an answer if and only if each of its tokens is the arg max given the right tokens before it. One
forward pass over the sequence with its right answer therefore decides it, and nothing is decoded.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from model.inference import evaluating
from model.loss import IGNORE
from model.transformer import Transformer

BAR = 0.856
"""Share of exact answers that a model must reach at a length: that of Llama 2 7B at 4k in RULER (Hsieh et al. 2024)."""


@dataclass(frozen=True)
class Answer:
    """`exact`: whether greedy decoding gives the right answer. `nll`: the nats of all its `tokens`."""

    exact: bool
    nll: float
    tokens: int


def answer_spans(targets: Tensor) -> Iterator[slice]:
    """Yields the slices of one sequence that hold answers: runs of scored tokens in targets int64 `[length]`."""
    scored = F.pad((targets != IGNORE).to(torch.int8).cpu(), (1, 1)).numpy()
    edges = np.flatnonzero(np.diff(scored))
    yield from (slice(int(start), int(stop)) for start, stop in zip(edges[::2], edges[1::2], strict=True))


@torch.no_grad()
def answer(model: Transformer, batch: Mapping[str, Tensor], vocabulary: int | None = None) -> list[Answer]:
    """Returns the answers of a batch in the order of its sequences.

    Args:
        batch: tokens, targets and position, int64 or int32 `[batch, length]`, one document per sequence. Targets are
            -100 except for the answers.
        vocabulary: size of the tokenizer's vocabulary, from which greedy decoding chooses; a model's is often larger.

    Raises:
        ValueError: the length exceeds the model's limit.
    """
    length, device = batch["tokens"].shape[1], model.embed_tokens.weight.device
    if length > model.config.max_length:
        raise ValueError(f"sequences of {length} tokens: the model takes {model.config.max_length}")
    tokens, targets, position = (batch[name].to(device) for name in ("tokens", "targets", "position"))
    with evaluating(model):
        hidden = model(tokens, position, model.build_layouts(None, length))
        scored = targets != IGNORE
        logits = model.logits(hidden[scored])
        logits = logits if logits.dtype == torch.float64 else logits.float()
    right = torch.zeros_like(targets, dtype=torch.bool)
    nats = torch.zeros_like(targets, dtype=torch.float64)
    right[scored] = logits[:, :vocabulary].argmax(-1) == targets[scored]
    nats[scored] = F.cross_entropy(logits, targets[scored], reduction="none").double()
    right, nats = right.cpu(), nats.cpu()
    return [
        Answer(bool(right[row, span].all()), float(nats[row, span].sum()), span.stop - span.start)
        for row in range(len(targets))
        for span in answer_spans(targets[row])
    ]


def effective_length(exact_match: Mapping[int, float]) -> int | None:
    """Returns the longest length whose share of exact answers reaches BAR, or None. `exact_match`: {length: share}."""
    return max((length for length, share in exact_match.items() if share >= BAR), default=None)

"""Samples continuations of many contexts. Forecasts of series are made from them."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from model.decoding.generation import generate
from model.decoding.sampling import Sampling
from model.evaluation.scoring import Progress
from model.transformer import Transformer


def sample_continuations(
    model: Transformer,
    contexts: Sequence[np.ndarray],
    new_tokens: int,
    *,
    sampling: Sampling,
    samples: int,
    sequences_at_once: int,
    prefill_chunk: int,
    vocabulary: int,
    progress: Progress = lambda tokens: None,
) -> np.ndarray:
    """Returns `samples` continuations of each context, int64 `[contexts, samples, new_tokens]`.

    The same contexts in the same order and the same `sampling` give the same tokens for any `sequences_at_once`.

    Args:
        contexts: integers `[tokens]` each.
        sequences_at_once: continuations that are decoded together; memory grows with it.
        prefill_chunk: tokens of a context that are read at once.
        vocabulary: continuations have only tokens below it.
        progress: called with the number of new tokens.
    """
    prompts = [context for context in contexts for _ in range(samples)]
    found = []
    for start in range(0, len(prompts), sequences_at_once):
        batch = prompts[start : start + sequences_at_once]
        found += generate(
            model,
            batch,
            new_tokens=new_tokens,
            sampling=replace(sampling, first=sampling.first + start),
            prefill_chunk=prefill_chunk,
            vocabulary=vocabulary,
        )
        progress(len(batch) * new_tokens)
    return np.array(found, dtype=np.int64).reshape(len(contexts), samples, new_tokens)

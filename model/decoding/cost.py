"""Measures the cost of decoding: the bytes of a trained model's cache, and the time of a token after a long context."""

import logging
import statistics
import time

import torch

from model.decoding.cache import Cache, expected_bytes
from model.decoding.cuda_graph import TokenStep
from model.inference import evaluating
from model.precision import autocast
from model.transformer import Transformer

log = logging.getLogger(__name__)

WARM_UP = 3
"""Tokens that are decoded before the clock starts."""

TOKENS = 8
"""Measured tokens, whose median counts."""


@torch.no_grad()
def decoding_cost(model: Transformer, context: int, precision: str) -> dict[str, float | None]:
    """Returns the cost of one sequence that has `context` tokens.

    The cache is filled with random keys and values, which cost as much as those of a text. On a GPU the step is
    replayed as a CUDA graph.

    Returns:
        cache_bytes: bytes of keys, values and routers' keys in all layers.
        decode_ms_per_token: milliseconds, from the last token to the next one's hidden state; None, with a warning,
            where the cache does not fit into memory.
    """
    device = model.embed_tokens.weight.device.type
    with evaluating(model), autocast(model, precision):
        number = torch.get_autocast_dtype(device).itemsize if torch.is_autocast_enabled(device) else None
        stored, _ = expected_bytes(model, context, 1, number)
        try:
            seconds = _seconds_per_token(model, context)
        except torch.OutOfMemoryError:
            log.warning("the cache of %s tokens does not fit into memory: its decoding is not timed", f"{context:,}")
            return {"cache_bytes": stored, "decode_ms_per_token": None}
    return {"cache_bytes": stored, "decode_ms_per_token": 1e3 * seconds}


def _seconds_per_token(model: Transformer, context: int) -> float:
    device = model.embed_tokens.weight.device
    token = torch.zeros(1, 1, dtype=torch.int64, device=device)
    capacity = context + WARM_UP + TOKENS
    cache = Cache(model, 1)
    cache.reserve(capacity)
    cache.extend(token)
    fill_with_random_keys(cache, context)
    step = TokenStep(cache, capacity, cuda_graph=device.type == "cuda")
    seconds = []
    for _ in range(WARM_UP + TOKENS):
        started = _now(device)
        step(token)
        seconds.append(_now(device) - started)
    return statistics.median(seconds[WARM_UP:])


def fill_with_random_keys(cache: Cache, context: int) -> None:
    """Makes every sequence `context` tokens long, with random keys and values. Room for them must be reserved
    (`cache.reserve`), and a token read, so that the tensors exist."""
    for tensor in cache.tensors():
        tensor.normal_()
    for layout in cache.layouts():
        layout.count.fill_(context // layout.span)
    cache.set_lengths([context] * cache.batch)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()

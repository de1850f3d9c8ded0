"""Decoding: the key-value cache of a model, and generation with it.

    cache.py        the cache of all layers (each layer's own is in model/attention/<family>/cache.py)
    cuda_graph.py   one token of every sequence in fixed shapes, recorded as a CUDA graph
    cost.py         bytes of the cache, and time of a token
    generation.py   prompts -> continuations
    sampling.py     from logits to a token: greedy, temperature, top-k, top-p
    streaming.py    tokens to text, one by one

tests/model/decoding/test_parity.py proves that decoding equals one pass over the whole text.
"""

from model.decoding.cache import Cache, expected_bytes
from model.decoding.cost import decoding_cost, fill_with_random_keys
from model.decoding.cuda_graph import TokenStep
from model.decoding.generation import generate
from model.decoding.sampling import Sampling

__all__ = [
    "Cache",
    "Sampling",
    "TokenStep",
    "decoding_cost",
    "expected_bytes",
    "fill_with_random_keys",
    "generate",
]

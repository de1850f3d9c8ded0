"""Decoding: the key-value cache of a model, and generation with it.

    cache.py        the cache of all layers (each layer's own is in model/attention/<family>/cache.py)
    cuda_graph.py   one token of every sequence in fixed shapes, recorded as a CUDA graph
    generation.py   prompts -> continuations
    sampling.py     from logits to a token: greedy, temperature, top-k, top-p
    streaming.py    tokens to text as they come

tests/model/decoding/test_parity.py proves that decoding equals one pass over the whole text.
"""

from model.decoding.cache import Cache, expected_bytes
from model.decoding.cuda_graph import TokenStep
from model.decoding.generation import generate
from model.decoding.sampling import Sampling

__all__ = ["Cache", "Sampling", "TokenStep", "expected_bytes", "generate"]

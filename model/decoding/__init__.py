"""Decoding: what a model remembers of a text, and how it goes on.

slots.py       which keys a pattern can still see, where they are kept, and which of them a query reads
direct.py      attention to few queries' keys, without tiles
cache.py       the keys and values of all layers, filled and read chunk by chunk
sampling.py    from logits to a token: greedy, temperature, top-k, top-p
generation.py  prompts -> continuations
"""

from model.decoding.cache import Cache, expected_bytes
from model.decoding.generation import generate
from model.decoding.sampling import Sampling

__all__ = ["Cache", "Sampling", "expected_bytes", "generate"]

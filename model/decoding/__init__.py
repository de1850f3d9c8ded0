"""Decoding: what a model remembers of a text, and how it goes on.

    cache.py       the keys and values of all layers, filled and read chunk by chunk
    step.py        a chunk on its way through the layers: how it attends to itself and to the past
    masked_cache.py, hierarchical_cache.py,
    routed_cache.py, native_sparse_cache.py    the cache of a layer, by family of attention
    summary_cache.py   summaries, and routers' keys, that are computed when their spans are full
    cache_layout.py    which keys a pattern can still see, where they are kept, and which of them a query reads
    store.py       keys and values, in the places that the layout gives them
    cuda_graph.py  one token of every sequence in fixed shapes, recorded as a CUDA graph
    generation.py  prompts -> continuations
    sampling.py    from logits to a token: greedy, temperature, top-k, top-p
    streaming.py   tokens to text as they come

That it all equals one pass over the whole text is proven in tests/model/decoding/test_parity.py.
"""

from model.decoding.cache import Cache, expected_bytes
from model.decoding.cuda_graph import TokenStep
from model.decoding.generation import generate
from model.decoding.sampling import Sampling

__all__ = ["Cache", "Sampling", "TokenStep", "expected_bytes", "generate"]

"""Key-value caches: the code that the caches of all families of attention share.

    cache_layout.py      which keys a pattern can still see, where they are kept, and which of them a query reads
    store.py             keys and values, in the slots that the layout gives them
    step.py              one chunk of tokens: lengths, positions and masks, computed once for all layers
    chunk_attention.py   attention of a chunk to itself and to the cached keys
    spans.py             the tokens of spans that are not full yet

The cache of each family is model/attention/<family>/cache.py; the cache of a whole model is model/decoding/cache.py.
"""

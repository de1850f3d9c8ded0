"""Attention in plain Triton, on GPUs of compute capability 8.0 and later, and for tests in Triton's interpreter.

dense/       attention under a BlockLayout, forward and backward
selection/   a router's top-k, and attention on a Selection, forward and backward
summaries/   summaries of spans, pooled and concatenated with the tokens' keys and values
decode/      attention of a decoding step to the keys of a cache
rotate.py    rotary embeddings
common.py    tensor descriptors, masks, products over visible pairs
"""

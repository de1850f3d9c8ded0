"""Attention of a decoding step to the keys of a cache.

decode_attention.py   one softmax over keys in several tensors
part.py               where keys lie, and which of them each query sees
"""

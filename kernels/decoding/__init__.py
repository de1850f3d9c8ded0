"""Attention of a decoding step to the keys of a cache (decode_attention.py)."""

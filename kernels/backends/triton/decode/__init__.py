"""Attention of a decoding step: few queries, the keys of a cache split among programs, then merged.

split_keys.py   a program attends to its share of the keys
combine.py      one softmax of what the shares have found
"""

from kernels.backends.triton.decode.split_keys import forward, unsupported

__all__ = ["forward", "unsupported"]

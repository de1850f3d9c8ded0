"""Attention of a decoding step: few queries, and the keys of a cache, split among programs.

split_keys.py   each program attends to one split of the keys
combine.py      merges the results of all splits into one softmax
"""

from kernels.backends.triton.decode.split_keys import forward, unsupported

__all__ = ["forward", "unsupported"]

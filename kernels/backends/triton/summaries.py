"""Summaries of spans straight into the joined keys and values: a program pools the pieces of one span and KV head.

A level is a launch, from fine to coarse: it reads the tokens, or the finer level's pooled keys and values (float32,
before the rotation), and writes its own, and the rotated key and the value where attention reads them. The backward
pass goes from coarse to fine.

    summaries_pool.py      a span's pool, which both passes compute
    summaries_forward.py   levels from fine to coarse
    summaries_backward.py  gradients from coarse to fine
    copying.py             the tokens beside them, to their places and back
"""

from kernels.backends.triton.copying import copy_tokens
from kernels.backends.triton.summaries_backward import backward
from kernels.backends.triton.summaries_forward import forward

__all__ = ["backward", "copy_tokens", "forward"]

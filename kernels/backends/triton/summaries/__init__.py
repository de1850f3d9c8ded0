"""Summaries of spans straight into the joined keys and values: a program pools the pieces of one span and KV head.

A level is a launch, from fine to coarse: it reads the tokens, or the finer level's pooled keys and values (float32,
before the rotation), and writes its own, and the rotated key and the value where attention reads them. The backward
pass goes from coarse to fine.

    pool_span.py        a span's pool, which both passes compute
    pool_levels.py      levels from fine to coarse
    pool_gradients.py   gradients from coarse to fine
    copy_tokens.py      the tokens beside them, to their places and back
"""

import torch

from kernels.backends.triton import common
from kernels.backends.triton.summaries.copy_tokens import copy_tokens
from kernels.backends.triton.summaries.pool_gradients import backward
from kernels.backends.triton.summaries.pool_levels import forward

__all__ = ["backward", "copy_tokens", "forward", "unsupported"]


def unsupported(device: str, dtype: torch.dtype) -> str | None:
    """Why these kernels cannot serve keys and values of such a dtype; None where they can."""
    return common.unsupported(device, dtype)

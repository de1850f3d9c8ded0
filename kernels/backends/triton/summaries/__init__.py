"""Pools spans into summaries and writes these into the joined keys and values; a program pools one span of one KV head.

Each level is one launch, from fine to coarse. It reads the children of its spans (the tokens, or the finer level's
pooled keys and values), and writes two results: the pooled keys and values (float32, not rotated), and the rotated keys
and the values among the keys of attention. The backward pass goes from coarse to fine.

    pool_span.py        the pool of a span, which both passes compute
    pool_levels.py      levels from fine to coarse
    pool_gradients.py   gradients from coarse to fine
    copy_tokens.py      copies the tokens to the joined keys, and gradients back
"""

import torch

from kernels.backends.triton import common
from kernels.backends.triton.summaries.copy_tokens import copy_tokens
from kernels.backends.triton.summaries.pool_gradients import backward
from kernels.backends.triton.summaries.pool_levels import forward

__all__ = ["backward", "copy_tokens", "forward", "unsupported"]


def unsupported(device: str, dtype: torch.dtype) -> str | None:
    """Why these kernels cannot serve keys and values of such a dtype, with what is accepted; None if they can."""
    return common.unsupported(device, dtype)

"""Attention under a BlockLayout on Hopper GPUs (H100, H200), in Gluon, Triton's language of explicit layouts.

The lists of tiles, masks and work are those of kernels/backends/triton/dense, and the kernels serve the same calls:
every pattern, packed documents, the same bits every time. Programs are persistent, with warp specialization: one warp
loads by TMA, ahead of two warpgroups that compute. A step's products run during the arithmetic of another step.

    forward.py            out and lse, by rows
    backward.py           dQ by rows, dK and dV by columns
    backward_queries.py   the kernel of dQ
    backward_keys.py      the kernel of dK and dV
    common.py             what they share
"""

import torch
from torch import Tensor

from kernels.backends.hopper.backward import backward
from kernels.backends.hopper.forward import forward
from kernels.layout.block_layout import BlockLayout
from kernels.shapes import compute_capability

__all__ = ["backward", "forward", "unsupported"]

DTYPES = (torch.bfloat16, torch.float16)
HEAD_DIMS = (64, 128)
BLOCK = 128


def unsupported(q: Tensor, k: Tensor, v: Tensor, layout: BlockLayout) -> str | None:
    """Why these kernels cannot serve this call, with what is accepted; None if they can."""
    if not q.is_cuda or compute_capability(q.device)[0] != 9:
        return f"device {q.device}: must be a Hopper GPU (compute capability 9)"
    if q.dtype not in DTYPES:
        return f"dtype {q.dtype}: must be one of {', '.join(map(str, DTYPES))}"
    if q.shape[-1] not in HEAD_DIMS:
        return f"head_dim {q.shape[-1]}: must be one of {', '.join(map(str, HEAD_DIMS))}"
    if layout.block != BLOCK:
        return f"block {layout.block}: must be {BLOCK}"
    return None

"""Attention under a BlockLayout. One kernel each serves every pattern: it walks the layout's list of (block, tile id),
masked tiles first. What differs between patterns is data, so nothing is compiled anew.

    forward.py            out and lse: a program walks a row of tiles
    backward.py           dQ by rows, dK and dV by columns, without atomics: the same bits every time
    backward_queries.py   the kernel of dQ
    backward_keys.py      the kernels of dK and dV
    work.py               what is prepared once per layout: order of work, transposed masks, long columns cut in chunks
    tile_sizes.py         tile shapes, warps and stages by dtype and head_dim

A NaN or an infinity in v reaches every query of a tile in which only some see it, and so do those of q, k and dO in the
gradients: a weight of 0 does not hide them. The backends `blocked` and `reference` have no such leak.
"""

import torch
import triton
from torch import Tensor

from kernels.backends.triton.dense.backward import backward
from kernels.backends.triton.dense.forward import forward
from kernels.backends.triton.dense.tile_sizes import DTYPES, HEAD_DIMS
from kernels.layout.block_layout import BlockLayout

__all__ = ["backward", "forward", "unsupported"]


def unsupported(q: Tensor, k: Tensor, v: Tensor, layout: BlockLayout) -> str | None:
    """Why these kernels cannot serve this call, naming what is possible; None where they can."""
    if q.dtype not in DTYPES:
        return f"dtype {q.dtype}: must be one of {', '.join(map(str, DTYPES))}"
    if q.shape[-1] not in HEAD_DIMS:
        return f"head_dim {q.shape[-1]}: must be one of {', '.join(map(str, HEAD_DIMS))}"
    if q.is_cuda:
        capability = torch.cuda.get_device_capability(q.device)
        if capability < (8, 0):
            return f"compute capability {capability[0]}.{capability[1]}: must be 8.0 or later"
    elif not triton.knobs.runtime.interpret:
        return f"device {q.device.type}: must be cuda (or cpu under TRITON_INTERPRET=1, for tests)"
    return None

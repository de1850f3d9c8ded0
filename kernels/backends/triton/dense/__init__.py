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

from torch import Tensor

from kernels.backends.triton import common
from kernels.backends.triton.dense.backward import backward
from kernels.backends.triton.dense.forward import forward
from kernels.layout.block_layout import BlockLayout

__all__ = ["backward", "forward", "unsupported"]


def unsupported(q: Tensor, k: Tensor, v: Tensor, layout: BlockLayout) -> str | None:
    """Why these kernels cannot serve this call, with what is accepted; None where they can."""
    return common.unsupported(q.device, q.dtype, q.shape[-1])

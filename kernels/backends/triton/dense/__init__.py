"""Attention under a BlockLayout. The same kernels serve every pattern: they walk the layout's lists of (block, tile
id), partial tiles first. Patterns differ only in data, so a new pattern needs no compilation.

    forward.py            out and lse: a program walks a row of tiles
    backward.py           dQ by rows, dK and dV by columns, without atomics: the same bits every time
    backward_queries.py   the kernel of dQ
    backward_keys.py      the kernels of dK and dV
    work.py               data prepared once per layout: order of work, transposed masks, chunks of long columns
    tile_sizes.py         tile shapes, warps and stages by dtype and head_dim

A weight of 0 does not hide a NaN or an infinity: one in v reaches all queries of a tile, if any of them sees it, and
those in q, k and dO reach the gradients in the same way. In the backends `blocked` and `reference`, they reach visible
pairs only.
"""

from torch import Tensor

from kernels.backends.triton import common
from kernels.backends.triton.dense.backward import backward
from kernels.backends.triton.dense.forward import forward
from kernels.layout.block_layout import BlockLayout

__all__ = ["backward", "forward", "unsupported"]


def unsupported(q: Tensor, k: Tensor, v: Tensor, layout: BlockLayout) -> str | None:
    """Why these kernels cannot serve this call, with what is accepted; None if they can."""
    return common.unsupported(q.device, q.dtype, q.shape[-1])

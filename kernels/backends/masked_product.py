"""Matrix products that sum over visible pairs alone; a weight of 0 would not hide a NaN, because 0 * NaN is NaN."""

import torch
from torch import Tensor

from kernels.shapes import is_captured, is_concrete


def all_finite(*tensors: Tensor) -> bool:
    """Whether no element is NaN or infinite; waits for the device. A sum that overflows counts as infinite."""
    sums = [t.sum(dtype=torch.float32 if t.dtype.itemsize < 4 else None) for t in tensors]
    return bool(torch.stack(sums).isfinite().all())


def can_synchronize(x: Tensor) -> bool:
    """Whether the host may read a value of x: not while a call is traced, or captured in a CUDA graph."""
    return is_concrete(x) and not is_captured(x)


def masked_product(left: Tensor, right: Tensor, visible: Tensor) -> Tensor:
    """`left @ right`, where element (i, d) is the sum over all j with `visible[..., i, j]`.

    left `[..., n, m]` must be 0 where `visible` (booleans, same shape or broadcastable) is false; right `[..., m, d]`.
    A NaN in `right` makes every sum that contains it NaN; an infinity keeps its sign, as if its weight were positive.
    """
    if can_synchronize(right) and all_finite(right):
        return left @ right
    seen = visible.to(left.dtype)
    result = left @ torch.where(right.isfinite(), right, 0.0)
    rising, falling = ((seen @ (~bounded).to(left.dtype)) > 0 for bounded in (right < torch.inf, right > -torch.inf))
    return result + torch.where(rising, torch.inf, 0.0) - torch.where(falling, torch.inf, 0.0)

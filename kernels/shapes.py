"""Checks of q, k and v that every attention call shares."""

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

BLOCK_SIZES = (16, 32, 64, 128)
"""Accepted tile sizes. 128 suits GPUs; smaller ones waste less at a window's edge and serve small tests."""


def require(condition: bool, message: str) -> None:
    """Raises ValueError with the message unless the condition holds."""
    if not condition:
        raise ValueError(message)


def is_concrete(q: Tensor) -> bool:
    """Whether a call on `q` computes values: False while a compiler traces it and for fake tensors."""
    return not torch.compiler.is_compiling() and not isinstance(q, FakeTensor)


def is_captured(x: Tensor) -> bool:
    """Whether a call on `x` is captured in a CUDA graph."""
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


@torch.compiler.assume_constant_result
def compute_capability(device: torch.device | str) -> tuple[int, int]:
    """The compute capability of a CUDA device."""
    return torch.cuda.get_device_capability(device)


def check_tensors(q: Tensor, k: Tensor, v: Tensor, device: torch.device, queries: int, keys: int, name: str) -> None:
    """Raises ValueError if q, k and v disagree with each other or with a layout.

    device, queries, keys: the layout's. name: "layout" or "selection", for the message.
    """
    require(
        q.dim() == k.dim() == v.dim() == 4, f"q, k, v have {q.dim()}, {k.dim()}, {v.dim()} dimensions: must be 4 each"
    )
    batch, heads, own_queries, head_dim = q.shape
    kv_heads, own_keys = k.shape[1:3]
    require(k.shape == v.shape, f"k {tuple(k.shape)} and v {tuple(v.shape)}: must have the same shape")
    require(k.shape[0] == batch, f"k has batch {k.shape[0]}: must be q's, {batch}")
    require(k.shape[3] == head_dim, f"k has head_dim {k.shape[3]}: must be q's, {head_dim}")
    require(heads % kv_heads == 0, f"q has {heads} heads: must be a multiple of the {kv_heads} KV heads")
    require(q.dtype == k.dtype == v.dtype, f"q, k, v are {q.dtype}, {k.dtype}, {v.dtype}: must have the same dtype")
    require(q.is_floating_point(), f"q is {q.dtype}: must be floating point")
    require(q.device == device, f"q is on {q.device}, the {name} on {device}: must be on the same device")
    require(own_queries == queries, f"q has {own_queries} queries: must be the {name}'s, {queries}")
    require(own_keys == keys, f"k has {own_keys} keys: must be the {name}'s, {keys}")

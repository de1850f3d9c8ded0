"""FlashAttention-4 (Dao et al.; the package flash-attn-4) on GPUs of compute capability 9.0 and 10.0.

It supports full causal attention and plain sliding windows, over sequences of one document. We call its deterministic
backward pass.
"""

import functools
import importlib.util

import torch
from torch import Tensor

from kernels.layout.block_layout import BlockLayout
from kernels.shapes import compute_capability

DTYPES = (torch.bfloat16, torch.float16)
HEAD_DIMS = (64, 128)
"""The sizes that the GPU tests cover."""


def unsupported(q: Tensor, k: Tensor, v: Tensor, layout: BlockLayout) -> str | None:
    """Why FlashAttention-4 cannot serve this call, with what is accepted; None if it can."""
    reason = missing(q)
    if reason:
        return reason
    if q.dtype not in DTYPES:
        return f"dtype {q.dtype}: must be one of {', '.join(map(str, DTYPES))}"
    if q.shape[-1] not in HEAD_DIMS:
        return f"head_dim {q.shape[-1]}: must be one of {', '.join(map(str, HEAD_DIMS))}"
    if layout.window is None:
        return "pattern: must be full attention, or a window without sink tokens, over sequences of one document"
    return None


def missing(q: Tensor) -> str | None:
    """Why q's device or this installation cannot run FlashAttention-4; None if it can."""
    if not q.is_cuda:
        return f"device {q.device.type}: must be cuda"
    capability = compute_capability(q.device)
    if capability[0] not in (9, 10):
        return f"compute capability {capability[0]}.{capability[1]}: must be 9.x or 10.x"
    return None if installed() else "the package flash-attn-4 is not installed: must be (pip install 'farsight[flash]')"


@torch.compiler.assume_constant_result
def installed() -> bool:
    """Whether FlashAttention-4 can be imported."""
    return _find()


@functools.cache
def _find() -> bool:
    try:
        return importlib.util.find_spec("flash_attn.cute") is not None
    except ImportError:
        return False


def _masking(layout: BlockLayout) -> dict[str, object]:
    """The layout's plain window in FlashAttention-4's arguments."""
    if layout.window >= layout.keys:
        return dict(causal=True)
    return dict(causal=False, window_size_left=layout.window - 1, window_size_right=0)


def forward(q: Tensor, k: Tensor, v: Tensor, layout: BlockLayout, scale: float) -> tuple[Tensor, Tensor]:
    """(out, lse), see kernels/backends/__init__.py."""
    from flash_attn.cute.interface import _flash_attn_fwd

    out = torch.empty_like(q)
    inputs = (t.transpose(1, 2) for t in (q, k, v))
    _, lse, *_ = _flash_attn_fwd(
        *inputs, softmax_scale=scale, return_lse=True, out=out.transpose(1, 2), **_masking(layout)
    )
    return out, lse


def backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    layout: BlockLayout,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv), like q, k, v."""
    from flash_attn.cute.interface import _flash_attn_bwd

    grads = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    dq, dk, dv = (t.transpose(1, 2) for t in grads)
    inputs = (t.transpose(1, 2) for t in (q, k, v, out, grad_out))
    _flash_attn_bwd(
        *inputs, lse, softmax_scale=scale, deterministic=True, dq=dq, dk=dk, dv=dv, dlse=grad_lse, **_masking(layout)
    )
    return grads

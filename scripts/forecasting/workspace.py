"""What the attention operators hold while they run, besides their results: to a ledger each of them is one opaque call.

Read off the backends, in elements of the dtype that they compute in. Legend: B batch, H heads, K KV heads, T queries, S
keys, D head_dim.
"""

from collections.abc import Callable
from math import prod
from typing import Any

from torch import Tensor

from kernels.backends import blocked, gathered


def workspace_bytes(operator: Any, arguments: tuple) -> int:
    """Bytes that `operator` (of torch.ops.farsight) holds at its peak, results not counted."""
    name = operator._schema.name.partition("::")[2]
    backend = arguments[-1] if isinstance(arguments[-1], str) else ""
    measure = _WORKSPACES.get((name, backend))
    return measure(*arguments) if measure else 0


def _blocked_forward(q, k, v, layout: list[Tensor], queries: int, keys: int, block: int, window, scale, *_) -> int:
    """Stacks of q, k, v and out, copied once more as they are cut or put together, and a piece of scores."""
    size = _computing(q)
    stacks = size * (2 * q.numel() + 2 * k.numel())
    return stacks + size * q.numel() + _masks(layout, block) + _piece(q, k, layout, block, size)


def _blocked_backward(grad_out, grad_lse, q, k, v, out, lse, layout, queries, keys, block, *_) -> int:
    """Stacks of q, k, v, grad_out and of the three gradients, which are put together last, and two pieces of scores."""
    size = _computing(q)
    stacks = size * (3 * q.numel() + 4 * k.numel())
    return stacks + size * q.numel() + _masks(layout, block) + 2 * _piece(q, k, layout, block, size)


def _masks(layout: list[Tensor], block: int) -> int:
    """The mask table as booleans."""
    return len(layout[10]) * block**2


def _piece(q: Tensor, k: Tensor, layout: list[Tensor], block: int, size: int) -> int:
    """Scores of a piece, what hides some of them, and the keys that were gathered for it."""
    group = q.shape[1] // k.shape[1]
    scores = max(blocked.SCORES_AT_ONCE, group * block**2)
    return scores * (size + 1) + size * scores // (group * block) * q.shape[-1]


def _gathered_forward(q, k, v, selection: list[Tensor], block: int, *_) -> int:
    size = _computing(q)
    piece = size * gathered.GATHERED_AT_ONCE[q.device.type]
    return size * (3 * q.numel() + 2 * k.numel()) + 2 * piece


def _gathered_backward(grad_out, grad_lse, q, k, v, out, lse, selection, block, *_) -> int:
    size = _computing(q)
    piece = size * gathered.GATHERED_AT_ONCE[q.device.type]
    repeat = selection[0].shape[1] // k.shape[1]  # selectors have gradients of K and V of their own
    return size * (4 * q.numel() + (2 + 2 * repeat) * k.numel()) + 3 * piece


def _triton_backward(grad_out, grad_lse, q, k, v, out, lse, layout, queries, keys, block, *_) -> int:
    """A row's log-sum-exp and delta, in float32."""
    return 8 * prod(q.shape[:3])


def _triton_selected_backward(grad_out, grad_lse, q, k, v, out, lse, selection: list[Tensor], block: int, *_) -> int:
    """A part of dQ for every query and chosen block, and dK and dV in float32."""
    chosen = selection[0]
    group = q.shape[1] // chosen.shape[1]
    return chosen.numel() * group * q.shape[-1] * q.element_size() + 2 * 4 * k.numel() * (chosen.shape[1] // k.shape[1])


def _triton_selected_forward(q, k, v, selection: list[Tensor], block: int, *_) -> int:
    """A partial output and its log-sum-exp for every query and chosen block."""
    chosen = selection[0]
    group = q.shape[1] // chosen.shape[1]
    return chosen.numel() * group * (q.shape[-1] * q.element_size() + 4)


def _computing(x: Tensor) -> int:
    """Bytes of the dtype that plain PyTorch computes in."""
    return max(4, x.element_size())


_WORKSPACES: dict[tuple[str, str], Callable[..., int]] = {
    ("attention", "blocked"): _blocked_forward,
    ("attention_backward", "blocked"): _blocked_backward,
    ("selected_attention", "blocked"): _gathered_forward,
    ("selected_attention_backward", "blocked"): _gathered_backward,
    ("attention_backward", "triton"): _triton_backward,
    ("selected_attention", "triton"): _triton_selected_forward,
    ("selected_attention_backward", "triton"): _triton_selected_backward,
}

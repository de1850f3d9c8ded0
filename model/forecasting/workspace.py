"""Memory that our own operators allocate internally, which the memory tracker cannot see.

The formulas give bytes. They follow the allocations in kernels/backends and model/parallel/exchange.py, in the dtype in
which each backend computes. Operators that compute in plain PyTorch, slice by slice, run on fake tensors instead.
"""

import functools
from collections.abc import Callable
from math import prod
from typing import Any

from torch import Tensor

from kernels.backends import blocked, gathered
from kernels.selection import indexer_loss

from ..parallel import exchange
from .memory_tracker import MemoryTracker


def workspace_bytes(operator: Any, arguments: tuple) -> int:
    """Returns the bytes that `operator` (of torch.ops.farsight) allocates at its peak, without its results."""
    name = operator._schema.name.partition("::")[2]
    backend = arguments[-1] if isinstance(arguments[-1], str) else ""
    measure = _WORKSPACES.get((name, backend))
    return measure(*arguments) if measure else 0


def _blocked_forward(q, k, v, layout: list[Tensor], queries: int, keys: int, block: int, window, scale, *_) -> int:
    """Stacked copies of q, k, v and out, one more copy while they are stacked, and one chunk of scores."""
    size = _compute_bytes(q)
    stacks = size * (2 * q.numel() + 2 * k.numel())
    return stacks + size * q.numel() + _masks(layout, block) + _chunk(q, k, layout, block, size)


def _blocked_backward(grad_out, grad_lse, q, k, v, out, lse, layout, queries, keys, block, *_) -> int:
    """Stacked copies of q, k, v, grad_out and the three gradients, and two chunks of scores."""
    size = _compute_bytes(q)
    stacks = size * (3 * q.numel() + 4 * k.numel())
    return stacks + size * q.numel() + _masks(layout, block) + 2 * _chunk(q, k, layout, block, size)


def _masks(layout: list[Tensor], block: int) -> int:
    """The table of partial tiles' masks as booleans."""
    return len(layout[10]) * block**2


def _chunk(q: Tensor, k: Tensor, layout: list[Tensor], block: int, size: int) -> int:
    """Scores of one chunk, their mask, and the keys that were gathered for the chunk."""
    group = q.shape[1] // k.shape[1]
    scores = max(blocked.SCORES_PER_CHUNK, group * block**2)
    return scores * (size + 1) + size * scores // (group * block) * q.shape[-1]


def _gathered_forward(q, k, v, selection: list[Tensor], block: int, *_) -> int:
    size = _compute_bytes(q)
    chunk = size * gathered.ELEMENTS_PER_CHUNK[q.device.type]
    return size * (3 * q.numel() + 2 * k.numel()) + 2 * chunk


def _gathered_backward(grad_out, grad_lse, q, k, v, out, lse, selection, block, *_) -> int:
    size = _compute_bytes(q)
    chunk = size * gathered.ELEMENTS_PER_CHUNK[q.device.type]
    repeat = selection[0].shape[1] // k.shape[1]  # each selector has its own gradients of K and V
    return size * (4 * q.numel() + (2 + 2 * repeat) * k.numel()) + 3 * chunk


def _triton_backward(grad_out, grad_lse, q, k, v, out, lse, layout, queries, keys, block, *_) -> int:
    """Log-sum-exp and delta of every row, in float32."""
    return 8 * prod(q.shape[:3])


def _triton_selected_backward(grad_out, grad_lse, q, k, v, out, lse, selection: list[Tensor], block: int, *_) -> int:
    """A partial dQ for every query and chosen block, and dK and dV in float32."""
    chosen = selection[0]
    group = q.shape[1] // chosen.shape[1]
    return chosen.numel() * group * q.shape[-1] * q.element_size() + 2 * 4 * k.numel() * (chosen.shape[1] // k.shape[1])


def _triton_selected_forward(q, k, v, selection: list[Tensor], block: int, *_) -> int:
    """A partial output and its log-sum-exp for every query and chosen block."""
    chosen = selection[0]
    group = q.shape[1] // chosen.shape[1]
    return chosen.numel() * group * (q.shape[-1] * q.element_size() + 4)


def _on_fake_tensors(compute: Callable[..., tuple[Tensor, ...]], *arguments) -> int:
    """The peak of `compute` in its first two slices: those that follow have the same sizes."""
    tracker = MemoryTracker(granularity=1, workspace=lambda *_: 0)
    with tracker:
        for argument in arguments:
            if isinstance(argument, Tensor):
                tracker.track(argument)
        given = tracker.total
        results = compute(*arguments, slices=2)
    returned = sum(result.untyped_storage().nbytes() for result in results)
    return tracker.peak[""] - given - returned


def _compute_bytes(x: Tensor) -> int:
    """Bytes per element of the dtype in which the PyTorch backends compute."""
    return max(4, x.element_size())


_WORKSPACES: dict[tuple[str, str], Callable[..., int]] = {
    ("attention", "blocked"): _blocked_forward,
    ("attention_backward", "blocked"): _blocked_backward,
    ("selected_attention", "blocked"): _gathered_forward,
    ("selected_attention_backward", "blocked"): _gathered_backward,
    ("attention_backward", "triton"): _triton_backward,
    ("attention_backward", "hopper"): _triton_backward,
    ("selected_attention", "triton"): _triton_selected_forward,
    ("selected_attention_backward", "triton"): _triton_selected_backward,
    ("indexer_loss", ""): functools.partial(_on_fake_tensors, indexer_loss.chosen_blocks),
    ("dense_indexer_loss", ""): functools.partial(_on_fake_tensors, indexer_loss.eligible_blocks),
    ("exchange", ""): exchange.workspace_bytes,
    ("exchange_backward", ""): functools.partial(exchange.workspace_bytes, backward=True),
}

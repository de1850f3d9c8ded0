"""Chooses the backend of every operation: one table of candidates, one rule for `auto`, one form of error.

A named backend is used or refused, never replaced. `auto` uses Triton's kernels on a GPU if they can serve the call,
and plain PyTorch otherwise.
"""

import functools
import importlib
import importlib.util
import logging
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.shapes import is_captured

log = logging.getLogger(__name__)


class Candidates(NamedTuple):
    """The backends of one operation."""

    modules: Mapping[str, str]
    """Backend -> the module that implements it, imported at its first use."""
    portable: str
    """The backend in plain PyTorch, which `auto` uses if Triton's kernels cannot serve the call."""


OPERATIONS = {
    "attention": Candidates(
        {
            "reference": "kernels.backends.reference",
            "blocked": "kernels.backends.blocked",
            "triton": "kernels.backends.triton.dense",
            "hopper": "kernels.backends.hopper",
            "flex": "kernels.backends.flex",
            "flash": "kernels.backends.flash",
        },
        portable="blocked",
    ),
    "selected_attention": Candidates(
        {
            "reference": "kernels.backends.reference",
            "blocked": "kernels.backends.gathered",
            "triton": "kernels.backends.triton.selection",
        },
        portable="blocked",
    ),
    "select": Candidates(
        {"blocked": "kernels.selection.routing", "triton": "kernels.backends.triton.selection.top_k"},
        portable="blocked",
    ),
    "join_summaries": Candidates(
        {"blocked": "kernels.summaries.span_pooling", "triton": "kernels.backends.triton.summaries"},
        portable="blocked",
    ),
    "decode_attention": Candidates(
        {"direct": "kernels.backends.direct", "triton": "kernels.backends.triton.decode"}, portable="direct"
    ),
}

BACKENDS = tuple(OPERATIONS["attention"].modules)
"""The names that `attention(backend=)` accepts besides "auto"."""

GPU_BACKENDS = ("triton", "hopper", "flex", "flash")

CAPTURABLE = ("triton", "hopper")
"""Backends of attention whose calls can be captured in a CUDA graph after a first call outside of it. `blocked` reads
values on the host, `flex` compiles for each layout, and FlashAttention-4 has not been captured."""


def check_capture(operation: str, backend: str, x: Tensor) -> None:
    """Raises RuntimeError if a call on `x` is captured in a CUDA graph, and `backend` is not one of CAPTURABLE."""
    if backend not in CAPTURABLE and is_captured(x):
        accepted = " or ".join(name for name in CAPTURABLE if name in OPERATIONS[operation].modules)
        raise RuntimeError(f"backend={backend!r} of {operation} in a CUDA graph: must be {accepted}")


def choose(
    operation: str, backend: str, on_gpu: bool, refusal: Callable[[str], str | None], log_choice: bool = False
) -> str:
    """The backend that serves one call of `operation`.

    `refusal(name)` returns why a backend cannot serve the call, or None. `log_choice`: log the backend that `auto` uses
    on a GPU, once for each choice and reason. ValueError: the named backend does not exist or cannot serve the call.
    """
    candidates = OPERATIONS[operation]
    if backend == "auto":
        if not on_gpu:
            return candidates.portable
        reason = refusal("triton")
        chosen = candidates.portable if reason else "triton"
        if log_choice:
            _log_once(operation, chosen, reason or "the fastest that is proven for this call")
        return chosen
    if backend not in candidates.modules:
        raise ValueError(f"backend={backend!r}: must be one of auto, {', '.join(candidates.modules)} for {operation}")
    reason = refusal(backend)
    if reason:
        raise ValueError(f"backend={backend!r} cannot serve this call: {reason}")
    return backend


@torch.compiler.assume_constant_result
def triton_refusal(operation: str, backend: str, *arguments: object) -> str | None:
    """Why Triton's kernels cannot serve a call, or None; None for backends in plain PyTorch, which serve every call.

    arguments: those of the kernels' `unsupported()`; torch.compile treats them as constants.
    """
    if backend != "triton":
        return None
    if not has_triton():
        return "the package triton is not installed"
    return module(operation, backend).unsupported(*arguments)


@torch.compiler.assume_constant_result
def has_triton() -> bool:
    """Whether the package triton is installed."""
    return importlib.util.find_spec("triton") is not None


_modules: dict[tuple[str, str], ModuleType] = {}


def module(operation: str, backend: str) -> ModuleType:
    """The module of a backend, imported at its first use; torch.compile traces the dictionary access, not the
    import."""
    key = operation, backend
    if key not in _modules:
        _modules[key] = importlib.import_module(OPERATIONS[operation].modules[backend])
    return _modules[key]


def load_backends() -> None:
    """Imports the backends of all operations, except Triton's if it is not installed: torch.compile cannot trace
    imports."""
    for operation, candidates in OPERATIONS.items():
        for backend in candidates.modules:
            if backend not in ("triton", "hopper") or has_triton():
                module(operation, backend)


@functools.cache
def _log_once(operation: str, backend: str, reason: str) -> None:
    log.info("backend of %s: %s (%s)", operation, backend, reason)

"""Checks a compiled kernel against the reference on a small problem, before its first use in a process.

Compilers have bugs: the assembler bundled with Triton 3.6 (ptxas 12.8) miscompiles one of our kernels, and ptxas 13.0
does not. A wrong kernel trains a wrong model silently, so each (backend, device, dtype, head_dim, group, block) is
checked once per process, forward and backward, in a few milliseconds after its compilation. FARSIGHT_SELF_CHECK=0
disables it. Only the GPU tests cover a router's top-k and `block_mass`.
"""

import functools
import os
from collections.abc import Callable
from types import ModuleType
from typing import NamedTuple

import torch
from torch.autograd.graph import saved_tensors_hooks

from kernels.backends import reference
from kernels.layout.axis import Axis
from kernels.layout.block_layout import BlockLayout
from kernels.layout.builder import build_layout
from kernels.layout.cached_keys import CachedKeys
from kernels.layout.selection import Selection
from kernels.patterns import Window
from kernels.selection.routing import document_starts, select

TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 3e-2}
"""Largest relative error (norm of the difference over norm of the reference) that rounding explains."""


class SelfCheckError(RuntimeError):
    """A kernel disagrees with the reference on this machine."""


class Problem(NamedTuple):
    """The properties of a call for which kernels are compiled, and so checked.

    group: query heads per KV head, or per selector. block: tokens in a tile or a selected block; None for decoding.
    """

    device: torch.device
    dtype: torch.dtype
    head_dim: int
    group: int
    block: int | None = None

    def __str__(self) -> str:
        return f"{self.device} ({self.dtype}, head_dim={self.head_dim})"


@functools.cache
def failure(backend: ModuleType, problem: Problem, plain: bool = False) -> str | None:
    """What is wrong with the results of `backend`, or why it has none; None: they differ from the reference by no more
    than rounding."""
    if os.environ.get("FARSIGHT_SELF_CHECK") == "0":
        return None
    try:
        found = errors(backend, problem, plain)
    except torch.OutOfMemoryError:
        raise  # of the caller's tensors, not of this small problem
    except Exception as error:  # a compiler that cannot compile a kernel raises errors of many kinds
        reason = next(iter(str(error).splitlines()), "")
        return (
            f"attention.backend={_choice(backend)} does not run on {problem}: {type(error).__name__}: {reason}. "
            "Try attention.backend=blocked."
        )
    return _describe_wrong(found, backend, problem)


@functools.cache
def check_selection(backend: ModuleType, problem: Problem) -> None:
    """Raises SelfCheckError if attention on a Selection is wrong by more than rounding."""
    if os.environ.get("FARSIGHT_SELF_CHECK") != "0":
        _raise(_describe_wrong(selection_errors(backend, problem), backend, problem))


@functools.cache
def check_decoding(problem: Problem) -> None:
    """Raises SelfCheckError if the kernels of decoding steps, which have no backward pass, are wrong by more than
    rounding."""
    if os.environ.get("FARSIGHT_SELF_CHECK") != "0":
        from kernels.backends.triton import decode

        _raise(_describe_wrong(decoding_errors(decode, problem), decode, problem))


def _raise(message: str | None) -> None:
    if message is not None:
        raise SelfCheckError(message)


def decoding_errors(backend: ModuleType, problem: Problem) -> dict[str, float]:
    """Returns the relative errors of two queries over consecutive keys and over listed slots, in sequences of two
    lengths."""
    device, dtype, head_dim, group, _ = problem
    kv_heads, entries, generator = 2, 150, torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(2, heads, length, head_dim, generator=generator).to(device, dtype)
        for heads, length in ((kv_heads * group, 2), (kv_heads, 2 * entries), (kv_heads, 2 * entries))
    )
    slots = torch.stack([torch.randperm(2 * entries, generator=generator)[:entries] for _ in range(2)])
    masks = torch.rand(2, 2, 1, 2, entries, generator=generator) < 0.5
    count = torch.tensor([entries, 7])
    mask = torch.cat([masks[0] & (torch.arange(entries) < count[:, None])[:, None, None], masks[1]], -1)
    slot = torch.cat([torch.arange(entries).expand(2, -1), slots], 1)
    keys = [t.double().cpu().gather(2, slot[:, None, :, None].expand(-1, kv_heads, -1, head_dim)) for t in (k, v)]
    truth = reference.masked_attention(q.double().cpu(), *keys, mask, head_dim**-0.5)
    masks, slots, count = masks.to(device), slots.to(device), count.to(device)
    parts = [CachedKeys(k, v, masks[0], None, count), CachedKeys(k, v, masks[1], slots[:, None])]
    results = backend.forward(q, parts, head_dim**-0.5, None)
    return {
        name: float((ours.double().cpu() - right).norm() / right.norm())
        for name, ours, right in zip(("output", "log-sum-exp"), results, truth, strict=True)
    }


def _choice(backend: ModuleType) -> str:
    """The value of attention.backend that chooses a module of kernels/backends: its file, or its folder."""
    return backend.__name__.removeprefix("kernels.backends.").partition(".")[0]


def _describe_wrong(errors_by_name: dict[str, float], backend: ModuleType, problem: Problem) -> str | None:
    for name, error in errors_by_name.items():
        if not error <= TOLERANCE[problem.dtype]:  # also for NaN
            return (
                f"attention.backend={_choice(backend)} computes a wrong {name} on {problem}, with a relative error of "
                f"{error:.1e}. Try TRITON_PTXAS_PATH=<a ptxas of CUDA 13.0 or later>, or attention.backend=blocked."
            )
    return None


def _isolated(function: Callable[..., dict[str, float]]) -> Callable[..., dict[str, float]]:
    """Runs a check with gradients enabled and without the caller's saved-tensor hooks: the first call may be in an
    evaluation without gradients, or in a layer under activation checkpointing, which must not save these tensors."""

    @functools.wraps(function)
    def isolated(*arguments, **settings) -> dict[str, float]:
        identity = lambda tensor: tensor  # noqa: E731
        with torch.inference_mode(False), torch.enable_grad(), saved_tensors_hooks(identity, identity):
            return function(*arguments, **settings)

    return isolated


@_isolated
def errors(backend: ModuleType, problem: Problem, plain: bool = False) -> dict[str, float]:
    """Returns the relative error of each result of `backend` for packed documents under a window with sink tokens;
    `plain`: for one document under a window without them."""
    device, block = problem.device, problem.block
    length = 4 * block - 5
    document = (torch.arange(length) >= 3 * block // 2).int()[None].to(device)
    axis = Axis.tokens(length, device=device) if plain else Axis.tokens(length, document)
    layout = build_layout(Window(block + 7, sink_tokens=0 if plain else 3), axis, block=block)
    return _errors(backend, layout, length, problem)


@_isolated
def selection_errors(backend: ModuleType, problem: Problem) -> dict[str, float]:
    """Returns the relative error of each result for packed documents in which each query chooses at most two blocks."""
    device, block = problem.device, problem.block
    length, generator = 6 * block - 5, torch.Generator().manual_seed(0)
    first = document_starts((torch.arange(length) >= 3 * block // 2).int()[None])
    draw = lambda n: torch.randn(1, 2, n, 8, generator=generator)  # noqa: E731
    settings = dict(top_k=2, window=block // 2, block=block, backend="blocked")
    selection = select(draw(length), draw(length // block), first, **settings)
    moved = [t.to(device) for t in selection.tensors()]
    return _errors(backend, Selection.from_tensors(moved, length, block), length, problem)


def _errors(backend: ModuleType, layout: BlockLayout | Selection, length: int, problem: Problem) -> dict[str, float]:
    device, dtype, head_dim, group, _ = problem
    kv_heads, generator = 2, torch.Generator().manual_seed(0)

    def draw(heads: int) -> torch.Tensor:
        return torch.randn(1, heads, length, head_dim, generator=generator).to(device, dtype)

    q, k, v, grad_out = draw(kv_heads * group), draw(kv_heads), draw(kv_heads), draw(kv_heads * group)
    grad_lse = torch.randn(q.shape[:3], generator=generator).to(device)
    scale = head_dim**-0.5

    truth_in = [t.double().requires_grad_() for t in (q, k, v)]
    truth_out, truth_lse = reference.masked_attention(*truth_in, layout.dense_mask(), scale)
    seen = truth_lse > -torch.inf  # under a Selection, some queries see no key
    grad_lse = torch.where(seen, grad_lse, 0.0)
    outputs = (truth_out, torch.where(seen, truth_lse, 0.0))
    truth_grads = torch.autograd.grad(outputs, truth_in, (grad_out.double(), grad_lse.double()))

    out, lse = backend.forward(q, k, v, layout, scale)
    grads = backend.backward(grad_out, grad_lse, q, k, v, out, lse, layout, scale)
    lse = torch.where(seen, lse, torch.where(lse == -torch.inf, 0.0, torch.nan))
    names = ("output", "log-sum-exp", "gradient of q", "gradient of k", "gradient of v")
    pairs = zip(names, (out, lse, *grads), (*outputs, *truth_grads), strict=True)
    return {name: float((ours.double() - truth).detach().norm() / truth.detach().norm()) for name, ours, truth in pairs}

"""The public operation `attention()`: softmax attention over the pairs that a layout makes visible.

    layout = build_layout(patterns.Window(1024), Axis.tokens(length))
    out = attention(q, k, v, layout)

Under `attention()` lie two `torch.library` operators, forward and backward, whose arguments are flat tensors and
scalars: to torch.compile, activation checkpointing and FSDP, attention is one opaque operation for every pattern.
"""

import functools
import logging
import math

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from kernels import dispatch, selfcheck
from kernels.layout.block_layout import BlockLayout
from kernels.layout.cost import BACKWARD_FLOPS, FORWARD_FLOPS
from kernels.layout.selection import Selection
from kernels.selection.selected_attention import selected_attention
from kernels.shapes import check_tensors, require
from kernels.softmax import add_sinks

log = logging.getLogger(__name__)

AUTOGRAD_BACKENDS = ("reference", "flex")
"""Backends without a backward pass of their own: autograd differentiates their forward pass."""

FLASH_WIDTHS = {
    "triton": ((1024, math.inf), (1024, 32768)),
    "hopper": ((16384, math.inf), (16384, 32768)),
}
"""Smallest and largest width of a plain window at which FlashAttention-4 is faster than our kernels, for the forward
and the backward pass (its deterministic backward pass is slow on long rows); measured at 1,024, 4,096, 32,768 and
131,072."""


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: BlockLayout | Selection,
    *,
    scale: float | None = None,
    sink_logits: Tensor | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention over the visible pairs of `layout`; differentiable in every tensor argument.

    q `[batch, heads, queries, head_dim]`, k and v `[batch, kv_heads, keys, head_dim]` with heads a multiple of
    kv_heads (GQA: query head h reads KV head h // (heads / kv_heads)), of one floating dtype and any strides. `scale`
    multiplies the scores (default 1 / sqrt(head_dim)). `sink_logits` `[heads]` add one score per head to the softmax,
    without a value (gpt-oss). `backend`: "auto" or one of kernels.dispatch.BACKENDS. With a Selection
    (kernels/selection/routing.py), each query attends to the key blocks that were chosen for it.

    Returns out `[batch, heads, queries, head_dim]` in q's dtype; with `return_lse` also the log-sum-exp of the scores
    (the sink's included) `[batch, heads, queries]`, float32 (float64 for float64 inputs), through which gradients flow
    too. A query without visible keys gets 0 and -inf. Raises ValueError, with what is accepted, if shapes, dtypes, the
    layout or the backend do not fit.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    if isinstance(layout, Selection):
        out, lse = selected_attention(q, k, v, layout, scale, backend)
        if sink_logits is not None:
            out, lse = add_sinks(out, lse, sink_logits)
        return (out, lse) if return_lse else out
    _check_shapes(q, k, v, layout)
    passes = choose_backends(q, k, v, layout, backend)
    if passes[0] in AUTOGRAD_BACKENDS:
        with _without_autocast(q):
            with_lse = return_lse or sink_logits is not None
            out, lse = _module(passes[0]).attention(q, k, v, layout, scale, with_lse)
    else:
        sizes = (layout.queries, layout.keys, layout.block, layout.window)
        automatic = backend == "auto"
        out, lse = torch.ops.farsight.attention(q, k, v, layout.tensors(), *sizes, scale, automatic, *passes)
    if sink_logits is not None:
        out, lse = add_sinks(out, lse, sink_logits)
    return (out, lse) if return_lse else out


def choose_backends(q: Tensor, k: Tensor, v: Tensor, layout: BlockLayout, backend: str = "auto") -> tuple[str, str]:
    """The backends that serve this call, (forward, backward). ValueError: the named backend cannot serve it.

    "auto" uses Hopper's kernels instead of Triton's where they can serve the call, and FlashAttention-4 for the passes
    in which it is faster (FLASH_WIDTHS).
    """

    def refusal(name: str) -> str | None:
        if name in ("triton", "hopper") and not dispatch.has_triton():
            return "the package triton is not installed"
        return _module(name).unsupported(q, k, v, layout)

    chosen = dispatch.choose("attention", backend, q.is_cuda, refusal)
    if backend == "auto" and chosen == "triton" and refusal("hopper") is None:
        chosen = "hopper"
    passes = (chosen, chosen)
    if backend == "auto" and chosen in FLASH_WIDTHS and layout.window is not None and refusal("flash") is None:
        width = min(layout.window, layout.keys)
        passes = tuple("flash" if low <= width <= high else chosen for low, high in FLASH_WIDTHS[chosen])
    return passes


@functools.cache
def _warn_once(message: str) -> None:
    log.warning(message)


@functools.cache
def _log_once(*passes: str) -> None:
    log.info("attention backend: %s forward, %s backward", *passes)


_module = functools.partial(dispatch.module, "attention")


def _without_autocast(q: Tensor) -> torch.autocast:
    """Disables the caller's autocast, which would round scores; each backend chooses the precision of its products."""
    return torch.autocast(q.device.type, enabled=False)


def _check_shapes(q: Tensor, k: Tensor, v: Tensor, layout: BlockLayout) -> None:
    check_tensors(q, k, v, layout.device, layout.queries, layout.keys, "layout")
    batch, kv_heads = k.shape[:2]
    require(layout.batch in (1, batch), f"the layout has batch {layout.batch}: must be 1 or q's, {batch}")
    require(layout.heads in (1, kv_heads), f"the layout has {layout.heads} heads: must be 1 or k's, {kv_heads}")


@torch.library.custom_op("farsight::attention", mutates_args=())
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: list[Tensor],
    queries: int,
    keys: int,
    block: int,
    window: int | None,
    scale: float,
    automatic: bool,
    backend: str,
    backward_backend: str,
) -> tuple[Tensor, Tensor]:
    # Here and not in `attention`, which a compiler may have traced.
    backend, backward_backend = (_checked(name, automatic, q, k, block) for name in (backend, backward_backend))
    dispatch.check_capture("attention", backend, q)
    _log_once(backend, backward_backend)
    with _without_autocast(q):
        return _module(backend).forward(q, k, v, BlockLayout.from_tensors(layout, queries, keys, block, window), scale)


def _checked(backend: str, automatic: bool, q: Tensor, k: Tensor, block: int) -> str:
    """The backend that serves a call for which `backend` was chosen: the same one, if it passes its self-check, which
    runs once per process. Hopper's kernels that `auto` chose and that fail it are replaced by Triton's, with a warning.
    SelfCheckError: another check fails."""
    if not q.is_cuda or backend not in ("triton", "hopper", "flash"):
        return backend
    problem = selfcheck.Problem(q.device, q.dtype, q.shape[-1], q.shape[1] // k.shape[1], block)
    failure = selfcheck.failure(_module(backend), problem, plain=backend == "flash")
    if failure is None:
        return backend
    if backend != "hopper" or not automatic:
        raise selfcheck.SelfCheckError(failure)
    _warn_once(f"{failure} Triton's kernels serve instead.")
    return _checked("triton", automatic, q, k, block)


@_forward.register_fake
def _(q, k, v, layout, queries, keys, block, window, scale, automatic, backend, backward_backend):
    lse_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return torch.empty_like(q), q.new_empty(q.shape[:-1], dtype=lse_dtype)


@torch.library.custom_op("farsight::attention_backward", mutates_args=())
def _backward(
    grad_out: Tensor,
    grad_lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    layout: list[Tensor],
    queries: int,
    keys: int,
    block: int,
    window: int | None,
    scale: float,
    automatic: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    backend = _checked(backend, automatic, q, k, block)
    dispatch.check_capture("attention", backend, q)
    layout = BlockLayout.from_tensors(layout, queries, keys, block, window)
    with _without_autocast(q):
        return _module(backend).backward(grad_out, grad_lse, q, k, v, out, lse, layout, scale)


@_backward.register_fake
def _(grad_out, grad_lse, q, k, v, out, lse, layout, queries, keys, block, window, scale, automatic, backend):
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _setup_context(ctx, inputs, output) -> None:
    q, k, v, layout, *ctx.scalars, _, ctx.backend = inputs
    ctx.save_for_backward(q, k, v, *output, *layout)


def _autograd(ctx, grad_out: Tensor, grad_lse: Tensor):
    q, k, v, out, lse, *layout = ctx.saved_tensors
    tensors = grad_out, grad_lse, q, k, v, out, lse, layout
    grads = torch.ops.farsight.attention_backward(*tensors, *ctx.scalars, ctx.backend)
    return *grads, [None] * len(layout), *[None] * (len(ctx.scalars) + 2)


_forward.register_autograd(_autograd, setup_context=_setup_context)


@register_flop_formula(torch.ops.farsight.attention, get_raw=True)
def _forward_flops(q, k, v, layout, *args, out_val=None, **kwargs) -> int:
    pairs = layout[-1]
    return (
        FORWARD_FLOPS * q.shape[-1] * int(pairs.sum()) * (q.shape[0] // pairs.shape[0]) * (q.shape[1] // pairs.shape[1])
    )


@register_flop_formula(torch.ops.farsight.attention_backward, get_raw=True)
def _backward_flops(grad_out, grad_lse, q, k, v, out, lse, layout, *args, out_val=None, **kwargs) -> int:
    return _forward_flops(q, k, v, layout) * BACKWARD_FLOPS // FORWARD_FLOPS

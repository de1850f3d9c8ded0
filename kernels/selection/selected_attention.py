"""Attention to the blocks of a Selection; `attention()` calls it when its layout is a Selection.

Two `torch.library` operators (forward, backward) take flat tensors and scalars, as those for a BlockLayout do. A third,
`block_mass`, returns the share of a query's softmax that each chosen block receives, the target of the indexer's loss.
"""

import functools

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from kernels import dispatch, selfcheck
from kernels.backends import reference
from kernels.layout.cost import BACKWARD_FLOPS, FORWARD_FLOPS
from kernels.layout.selection import Selection
from kernels.shapes import check_tensors, is_concrete, require


def selected_attention(
    q: Tensor, k: Tensor, v: Tensor, selection: Selection, scale: float, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """(out, lse), shapes as in `attention()`; differentiable in q, k and v. ValueError: no backend can serve the
    call."""
    _check_shapes(q, k, v, selection)
    backend = choose_backend(q, selection, backend)
    if backend == "reference":
        repeat = selection.selectors // k.shape[1]
        k, v = (t.repeat_interleave(repeat, 1) for t in (k, v))
        with torch.autocast(q.device.type, enabled=False):
            return reference.masked_attention(q, k, v, selection.dense_mask(), scale)
    scalars = (selection.block, scale, backend)
    return torch.ops.farsight.selected_attention(q, k, v, selection.tensors(), *scalars)


def block_mass(
    q: Tensor, k: Tensor, lse: Tensor, selection: Selection, scale: float | None = None, backend: str = "auto"
) -> Tensor:
    """The share of attention that each chosen block receives: `[batch, selectors, queries, slots]`, not differentiable.

    lse `[batch, heads, queries]`: the log-sum-exp of all scores of a query, including those outside the selection. A
    block's share is exp(block's log-sum-exp - lse), averaged over the selector's query heads. Unused slots get 0.
    float32 (float64 for float64 inputs).
    """
    _check_shapes(q, k, k, selection)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    backend = choose_backend(q, selection, backend)
    backend = "blocked" if backend == "reference" else backend
    q, k, lse = q.detach(), k.detach(), lse.detach()
    return torch.ops.farsight.block_mass(q, k, lse, selection.tensors(), selection.block, scale, backend)


def choose_backend(q: Tensor, selection: Selection, backend: str = "auto") -> str:
    """The backend that serves this call. ValueError: the named backend cannot serve it."""
    arguments = (q.device.type, q.dtype, q.shape[-1], q.shape[1] // selection.selectors, selection.block)
    refusal = lambda name: dispatch.triton_refusal("selected_attention", name, *arguments)  # noqa: E731
    return dispatch.choose("selected_attention", backend, q.is_cuda, refusal, log_choice=is_concrete(q))


_module = functools.partial(dispatch.module, "selected_attention")


def _check_shapes(q: Tensor, k: Tensor, v: Tensor, selection: Selection) -> None:
    check_tensors(q, k, v, selection.device, selection.queries, selection.keys, "selection")
    (batch, heads), kv_heads = q.shape[:2], k.shape[1]
    require(selection.batch == batch, f"the selection has batch {selection.batch}: must be q's, {batch}")
    require(
        selection.selectors in (kv_heads, heads),
        f"the selection has {selection.selectors} selectors: must be k's {kv_heads} heads or q's {heads}",
    )


@torch.library.custom_op("farsight::selected_attention", mutates_args=())
def _forward(
    q: Tensor, k: Tensor, v: Tensor, selection: list[Tensor], block: int, scale: float, backend: str
) -> tuple[Tensor, Tensor]:
    dispatch.check_capture("selected_attention", backend, q)
    selection = Selection.from_tensors(selection, k.shape[2], block)
    if backend == "triton" and q.is_cuda:  # here and not above, where a compiler may trace
        problem = selfcheck.Problem(q.device, q.dtype, q.shape[-1], q.shape[1] // selection.selectors, block)
        selfcheck.check_selection(_module(backend), problem)
    with torch.autocast(q.device.type, enabled=False):
        return _module(backend).forward(q, k, v, selection, scale)


@_forward.register_fake
def _(q, k, v, selection, block, scale, backend):
    return torch.empty_like(q), q.new_empty(q.shape[:-1], dtype=_accumulation(q.dtype))


@torch.library.custom_op("farsight::selected_attention_backward", mutates_args=())
def _backward(
    grad_out: Tensor,
    grad_lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    selection: list[Tensor],
    block: int,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    dispatch.check_capture("selected_attention", backend, q)
    with torch.autocast(q.device.type, enabled=False):
        selection = Selection.from_tensors(selection, k.shape[2], block)
        return _module(backend).backward(grad_out, grad_lse, q, k, v, out, lse, selection, scale)


@_backward.register_fake
def _(grad_out, grad_lse, q, k, v, out, lse, selection, block, scale, backend):
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _setup_context(ctx, inputs, output) -> None:
    q, k, v, selection, *ctx.scalars = inputs
    ctx.save_for_backward(q, k, v, *output, *selection)


def _autograd(ctx, grad_out: Tensor, grad_lse: Tensor):
    q, k, v, out, lse, *selection = ctx.saved_tensors
    arguments = (grad_out, grad_lse, q, k, v, out, lse, selection, *ctx.scalars)
    grads = torch.ops.farsight.selected_attention_backward(*arguments)
    return *grads, [None] * len(selection), *[None] * len(ctx.scalars)


_forward.register_autograd(_autograd, setup_context=_setup_context)


@torch.library.custom_op("farsight::block_mass", mutates_args=())
def _block_mass(
    q: Tensor, k: Tensor, lse: Tensor, selection: list[Tensor], block: int, scale: float, backend: str
) -> Tensor:
    dispatch.check_capture("selected_attention", backend, q)
    with torch.autocast(q.device.type, enabled=False):
        selection = Selection.from_tensors(selection, k.shape[2], block)
        return _module(backend).block_mass(q, k, lse, selection, scale)


@_block_mass.register_fake
def _(q, k, lse, selection, block, scale, backend):
    return q.new_empty(selection[0].shape, dtype=_accumulation(q.dtype))


def _accumulation(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _pairs(q: Tensor, k: Tensor, selection: list[Tensor], block: int) -> int:
    """Visible pairs over all query heads."""
    pairs = Selection.from_tensors(selection, k.shape[2], block).pairs()
    return int(pairs.sum()) * (q.shape[1] // pairs.shape[1])


@register_flop_formula(torch.ops.farsight.selected_attention, get_raw=True)
def _forward_flops(q, k, v, selection, block, *args, out_val=None, **kwargs) -> int:
    return FORWARD_FLOPS * q.shape[-1] * _pairs(q, k, selection, block)


@register_flop_formula(torch.ops.farsight.selected_attention_backward, get_raw=True)
def _backward_flops(grad_out, grad_lse, q, k, v, out, lse, selection, block, *args, out_val=None, **kwargs) -> int:
    return BACKWARD_FLOPS * q.shape[-1] * _pairs(q, k, selection, block)


@register_flop_formula(torch.ops.farsight.block_mass, get_raw=True)
def _block_mass_flops(q, k, lse, selection, block, *args, out_val=None, **kwargs) -> int:
    return FORWARD_FLOPS // 2 * q.shape[-1] * _pairs(q, k, selection, block)

"""Tokens and their summaries on one key axis, in one pass over the keys and values: pooled, rotated, put in place.

For GPUs, as an operator with kernels of its own (kernels/backends/triton/summaries): it replaces a dozen passes of
span_pooling.py, a rotation and `concatenate_keys`. Levels are pooled one from the other, in float32.
"""

from types import ModuleType

import torch
from torch import Tensor

from kernels import dispatch
from kernels.summaries.hierarchy import Hierarchy


def fused(values: Tensor, backend: str) -> bool:
    """Whether `join_summaries` serves: on a GPU with Triton, unless attention's `backend` is plain PyTorch."""
    if backend in ("reference", "blocked"):
        return False
    refusal = lambda name: dispatch.triton_refusal("join_summaries", name, values.device.type, values.dtype)  # noqa: E731
    return dispatch.choose("join_summaries", "auto", values.is_cuda, refusal) == "triton"


def join_summaries(
    hierarchy: Hierarchy,
    keys: Tensor | None,
    unrotated: Tensor,
    values: Tensor,
    query: Tensor | None,
    rotation: tuple[Tensor, Tensor],
) -> tuple[Tensor, Tensor]:
    """(keys, values) `[batch, kv_heads, keys, head_dim]` of the levels of `hierarchy`, as its layout wants them.

    keys, unrotated, values `[batch, length, kv_heads, head_dim]`: the tokens' keys after and before the rotation. keys
    None: the hierarchy has no level of tokens. query float `[levels of summaries, kv_heads, head_dim]`: a piece's score
    is its product with its unrotated key, and its weight the softmax within the span; None: all pieces weigh alike.
    rotation: cos and sin, float32 `[batch or 1, length, 1, head_dim / 2]`; a summary is rotated as the token in the
    middle of its span. Differentiable in keys, unrotated, values and query.
    """
    levels = [level for level in hierarchy.levels if level.span > 1]
    axes = [level.places for level in levels]
    cos, sin = (each.contiguous() for each in rotation)
    query = None if query is None else query[: len(levels)]
    spans = [level.span for level in levels]
    return torch.ops.farsight.join_summaries(
        keys, unrotated, values, query, cos, sin, axes, spans, hierarchy.layout.block
    )[:2]


def _places(length: int, axes: list[Tensor], block: int) -> list[int]:
    """Where the summaries of each level begin among `length` tokens' joined keys, and where the last end."""
    places = [-(-length // block) * block]
    for axis in axes:
        places.append(places[-1] + -(-axis.shape[2] // block) * block)
    return places


def _kernels() -> ModuleType:
    return dispatch.module("join_summaries", "triton")


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


@torch.library.custom_op("farsight::join_summaries", mutates_args=())
def _join(
    keys: Tensor | None,
    unrotated: Tensor,
    values: Tensor,
    query: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    axes: list[Tensor],
    spans: list[int],
    block: int,
) -> tuple[Tensor, Tensor, Tensor]:
    batch, length, kv_heads, head_dim = values.shape
    tokens = 0 if keys is None else length
    places = _places(tokens, axes, block)
    joined = [values.new_empty(batch, kv_heads, places[-1], head_dim) for _ in range(2)]
    if keys is not None:
        _kernels().copy_tokens((_rows(keys), _rows(values)), [whole.transpose(1, 2) for whole in joined], places[0])
    given = _rows(unrotated), _rows(values), None if query is None else query.contiguous()
    pooled = _kernels().forward(*given, cos, sin, axes, spans, places, joined)
    return *joined, pooled


@_join.register_fake
def _(keys, unrotated, values, query, cos, sin, axes, spans, block):
    batch, length, kv_heads, head_dim = values.shape
    places = _places(0 if keys is None else length, axes, block)
    joined = [values.new_empty(batch, kv_heads, places[-1], head_dim) for _ in range(2)]
    slots = sum(axis.shape[2] for axis in axes)
    return *joined, values.new_empty(2, batch, slots, kv_heads, head_dim, dtype=torch.float32)


@torch.library.custom_op("farsight::join_summaries_backward", mutates_args=())
def _join_backward(
    grad_keys: Tensor,
    grad_values: Tensor,
    unrotated: Tensor,
    values: Tensor,
    query: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    axes: list[Tensor],
    spans: list[int],
    block: int,
    pooled: Tensor,
    tokens: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of unrotated, values and query (without one: of size 0)."""
    length = values.shape[1]
    grads = _rows(grad_keys), _rows(grad_values)
    of_values = values.new_empty(values.shape) if tokens else values.new_zeros(values.shape)
    if tokens:
        _kernels().copy_tokens([grads[1][:, :, :length].transpose(1, 2)], [of_values], length)
    given = _rows(unrotated), _rows(values), None if query is None else query.contiguous()
    places = _places(length if tokens else 0, axes, block)
    of_unrotated, of_query = _kernels().backward(grads, *given, cos, sin, axes, spans, places, pooled, of_values)
    return of_unrotated, of_values, values.new_empty(0) if of_query is None else of_query


@_join_backward.register_fake
def _(grad_keys, grad_values, unrotated, values, query, cos, sin, axes, spans, block, pooled, tokens):
    plain = lambda x: x.new_empty(x.shape)  # noqa: E731
    return plain(unrotated), plain(values), values.new_empty(0) if query is None else plain(query)


def _setup_context(ctx, inputs, output) -> None:
    keys, unrotated, values, query, cos, sin, axes, ctx.spans, ctx.block = inputs
    ctx.tokens, ctx.learned, ctx.levels = keys is not None, query is not None, len(axes)
    ctx.save_for_backward(unrotated, values, values[:0] if query is None else query, cos, sin, *axes, output[2])


def _autograd(ctx, grad_keys: Tensor, grad_values: Tensor, _grad_pooled: Tensor):
    unrotated, values, query, cos, sin, *axes, pooled = ctx.saved_tensors
    query = query if ctx.learned else None
    given = unrotated, values, query, cos, sin, axes, ctx.spans, ctx.block, pooled, ctx.tokens
    of_unrotated, of_values, of_query = torch.ops.farsight.join_summaries_backward(grad_keys, grad_values, *given)
    of_keys = grad_keys[:, :, : values.shape[1]].transpose(1, 2) if ctx.tokens else None
    return (
        of_keys,
        of_unrotated,
        of_values,
        of_query if ctx.learned else None,
        *[None] * 2,
        [None] * ctx.levels,
        None,
        None,
    )


_join.register_autograd(_autograd, setup_context=_setup_context)

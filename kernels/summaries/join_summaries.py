"""Pools, rotates and concatenates the keys and values of tokens and summaries in one operator, for GPUs.

Its Triton kernels (kernels/backends/triton/summaries) read the keys and values once, in place of a dozen passes by
span_pooling.py, the rotation and `concatenate_keys`. Each level is pooled from the finer one, in float32.
"""

from types import ModuleType

import torch
from torch import Tensor

from kernels import dispatch
from kernels.summaries.hierarchy import Hierarchy


def can_join(values: Tensor, backend: str) -> bool:
    """Whether `join_summaries` can run: on a GPU with Triton, unless attention's `backend` is plain PyTorch."""
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
    """Returns the (keys, values) of all levels, `[batch, kv_heads, keys, head_dim]`, for the layout of `hierarchy`.

    keys, unrotated, values `[batch, length, kv_heads, head_dim]`: the tokens' keys after and before the rotation, and
    their values. keys None: the hierarchy has no level of tokens. query, float `[levels of summaries, kv_heads,
    head_dim]`: a child (a token, or a summary of the finer level) is scored by the product of query and its unrotated
    key; the softmax over the span gives the weights. None: equal weights. rotation: cos and sin, float32 `[batch or 1,
    length, 1, head_dim / 2]`; a summary is rotated to the position of its span's middle token. Differentiable in keys,
    unrotated, values and query.
    """
    levels = [level for level in hierarchy.levels if level.span > 1]
    intervals = [level.intervals for level in levels]
    cos, sin = (each.contiguous() for each in rotation)
    query = None if query is None else query[: len(levels)]
    spans = [level.span for level in levels]
    return torch.ops.farsight.join_summaries(
        keys, unrotated, values, query, cos, sin, intervals, spans, hierarchy.layout.block
    )[:2]


def _level_offsets(length: int, intervals: list[Tensor], block: int) -> list[int]:
    """The index of each level's first summary among the joined keys of `length` tokens, then the end of the last
    level."""
    offsets = [-(-length // block) * block]
    for level in intervals:
        offsets.append(offsets[-1] + -(-level.shape[2] // block) * block)
    return offsets


def _kernels() -> ModuleType:
    return dispatch.module("join_summaries", "triton")


def _contiguous_rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


@torch.library.custom_op("farsight::join_summaries", mutates_args=())
def _join(
    keys: Tensor | None,
    unrotated: Tensor,
    values: Tensor,
    query: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    intervals: list[Tensor],
    spans: list[int],
    block: int,
) -> tuple[Tensor, Tensor, Tensor]:
    batch, length, kv_heads, head_dim = values.shape
    tokens = 0 if keys is None else length
    offsets = _level_offsets(tokens, intervals, block)
    joined = [values.new_empty(batch, kv_heads, offsets[-1], head_dim) for _ in range(2)]
    if keys is not None:
        _kernels().copy_tokens(
            (_contiguous_rows(keys), _contiguous_rows(values)), [whole.transpose(1, 2) for whole in joined], offsets[0]
        )
    inputs = _contiguous_rows(unrotated), _contiguous_rows(values), None if query is None else query.contiguous()
    pooled = _kernels().forward(*inputs, cos, sin, intervals, spans, offsets, joined)
    return *joined, pooled


@_join.register_fake
def _(keys, unrotated, values, query, cos, sin, intervals, spans, block):
    batch, length, kv_heads, head_dim = values.shape
    offsets = _level_offsets(0 if keys is None else length, intervals, block)
    joined = [values.new_empty(batch, kv_heads, offsets[-1], head_dim) for _ in range(2)]
    entries = sum(level.shape[2] for level in intervals)
    return *joined, values.new_empty(2, batch, entries, kv_heads, head_dim, dtype=torch.float32)


@torch.library.custom_op("farsight::join_summaries_backward", mutates_args=())
def _join_backward(
    grad_joined_keys: Tensor,
    grad_joined_values: Tensor,
    unrotated: Tensor,
    values: Tensor,
    query: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    intervals: list[Tensor],
    spans: list[int],
    block: int,
    pooled: Tensor,
    has_tokens: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of unrotated, values and query (of size 0 if there is no query)."""
    length = values.shape[1]
    grads = _contiguous_rows(grad_joined_keys), _contiguous_rows(grad_joined_values)
    grad_values = values.new_empty(values.shape) if has_tokens else values.new_zeros(values.shape)
    if has_tokens:
        _kernels().copy_tokens([grads[1][:, :, :length].transpose(1, 2)], [grad_values], length)
    inputs = _contiguous_rows(unrotated), _contiguous_rows(values), None if query is None else query.contiguous()
    offsets = _level_offsets(length if has_tokens else 0, intervals, block)
    grad_unrotated, grad_query = _kernels().backward(
        grads, *inputs, cos, sin, intervals, spans, offsets, pooled, grad_values
    )
    return grad_unrotated, grad_values, values.new_empty(0) if grad_query is None else grad_query


@_join_backward.register_fake
def _(
    grad_joined_keys,
    grad_joined_values,
    unrotated,
    values,
    query,
    cos,
    sin,
    intervals,
    spans,
    block,
    pooled,
    has_tokens,
):
    empty = lambda x: x.new_empty(x.shape)  # noqa: E731
    return empty(unrotated), empty(values), values.new_empty(0) if query is None else empty(query)


def _setup_context(ctx, inputs, output) -> None:
    keys, unrotated, values, query, cos, sin, intervals, ctx.spans, ctx.block = inputs
    ctx.has_tokens, ctx.learned, ctx.levels = keys is not None, query is not None, len(intervals)
    ctx.save_for_backward(unrotated, values, values[:0] if query is None else query, cos, sin, *intervals, output[2])


def _autograd(ctx, grad_joined_keys: Tensor, grad_joined_values: Tensor, _grad_pooled: Tensor):
    unrotated, values, query, cos, sin, *intervals, pooled = ctx.saved_tensors
    query = query if ctx.learned else None
    inputs = unrotated, values, query, cos, sin, intervals, ctx.spans, ctx.block, pooled, ctx.has_tokens
    grad_unrotated, grad_values, grad_query = torch.ops.farsight.join_summaries_backward(
        grad_joined_keys, grad_joined_values, *inputs
    )
    grad_keys = grad_joined_keys[:, :, : values.shape[1]].transpose(1, 2) if ctx.has_tokens else None
    return (
        grad_keys,
        grad_unrotated,
        grad_values,
        grad_query if ctx.learned else None,
        *[None] * 2,
        [None] * ctx.levels,
        None,
        None,
    )


_join.register_autograd(_autograd, setup_context=_setup_context)

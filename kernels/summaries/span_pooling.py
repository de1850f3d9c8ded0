"""Pools the keys and values of spans into summaries, level by level, in O(tokens) time and memory."""

import torch
from torch import Tensor

from kernels.layout.axis import Axis


def pool(
    keys: Tensor, values: Tensor, scores: Tensor | None, axis: Axis, span: int, child_span: int = 1
) -> tuple[Tensor, Tensor]:
    """Pools the children of each span of `axis` (an Axis.summaries of `span`) into one key and one value.

    A span's children are its tokens (`child_span` 1), or its summaries on a finer level, whose spans of `child_span`
    tokens divide this level's. keys and values `[batch, children, kv_heads, head_dim]`. scores `[batch, children,
    kv_heads]`: their softmax over each span gives the weights; None: equal weights. Returns the pooled keys and values,
    `[batch, entries of axis, kv_heads, head_dim]` in float32 (float64 for float64 inputs), with zeros for empty
    entries. Differentiable in every tensor.
    """
    with torch.autocast(keys.device.type, enabled=False):
        return pool_spans(
            *(None if each is None else _group_by_span(each, axis, span, child_span) for each in (keys, values, scores))
        )


def pool_spans(keys: Tensor, values: Tensor, scores: Tensor | None) -> tuple[Tensor, Tensor]:
    """As `pool`, with children grouped by span: keys, values `[batch, spans, children, kv_heads, head_dim]`, scores
    `[batch, spans, children, kv_heads]`."""
    dtype = torch.float64 if keys.dtype == torch.float64 else torch.float32
    with torch.autocast(keys.device.type, enabled=False):
        # float32 weights times bfloat16 keys give float32 without a float32 copy of the keys, which autograd would
        # keep.
        if scores is None:
            return keys.mean(2, dtype=dtype), values.mean(2, dtype=dtype)
        weights = scores.to(dtype).softmax(2)[..., None]
        return (weights * keys).sum(2), (weights * values).sum(2)


def middles(axis: Axis, span: int) -> Tensor:
    """int64 `[batch, entries of axis]`: the sequence index of each span's middle token, the position of its summary.

    Empty entries get an index within the sequence, too.
    """
    return axis.origin.long() + axis.start + torch.where(axis.end > axis.start, span // 2, -1)


def _group_by_span(x: Tensor, axis: Axis, span: int, child_span: int) -> Tensor:
    """`[batch, children, ...]` -> `[batch, entries, span / child_span, ...]`: the children of every span, zeros if
    empty."""
    children = span // child_span
    if axis.key is not None:  # without packed documents, spans are consecutive
        return x[:, : axis.length * children].unflatten(1, (axis.length, children))
    # The children of a span are consecutive entries of the finer level: an entry's index follows from its first token.
    first = (axis.origin + axis.start).long() // child_span
    index = (first[..., None] + torch.arange(children, device=x.device)).clamp(max=x.shape[1] - 1)
    index = index + torch.arange(x.shape[0], device=x.device)[:, None, None] * x.shape[1]
    taken = x.flatten(0, 1).index_select(0, index.flatten()).view(*index.shape, *x.shape[2:])
    # An empty entry's index may point to another document, whose values may be NaN; `where` also blocks their gradient.
    whole = (axis.end > axis.start).view(*axis.start.shape, *[1] * (taken.dim() - 2))
    return torch.where(whole, taken, 0.0)

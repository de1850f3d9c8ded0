"""Pools the keys and values of spans into summaries, level by level: O(tokens) work, nothing of size tokens x spans."""

import torch
from torch import Tensor

from kernels.layout.axis import Axis


def pool(
    keys: Tensor, values: Tensor, scores: Tensor | None, axis: Axis, span: int, unit: int = 1
) -> tuple[Tensor, Tensor]:
    """The summaries of the spans of `axis` (Axis.summaries of that `span`), made of pieces of `unit` tokens each.

    keys and values `[batch, pieces, kv_heads, head_dim]`: the tokens (unit 1), or the summaries of a finer level whose
    spans are `unit` long and divide this one's. scores `[batch, pieces, kv_heads]` weigh the pieces by a softmax within
    their span; None: they weigh alike. Returns the pooled keys and values, `[batch, slots, kv_heads, head_dim]` in
    float32 (float64 for float64 inputs); empty slots hold zeros. Differentiable in every tensor.
    """
    with torch.autocast(keys.device.type, enabled=False):
        return pool_spans(*(None if each is None else _cut(each, axis, span, unit) for each in (keys, values, scores)))


def pool_spans(keys: Tensor, values: Tensor, scores: Tensor | None) -> tuple[Tensor, Tensor]:
    """As `pool`, of spans that are cut already: keys and values `[batch, spans, pieces, kv_heads, head_dim]`, scores
    `[batch, spans, pieces, kv_heads]`."""
    dtype = torch.float64 if keys.dtype == torch.float64 else torch.float32
    with torch.autocast(keys.device.type, enabled=False):
        # Products of float32 weights and bfloat16 keys are float32: no copy of the keys is made, or kept for the
        # backward pass.
        if scores is None:
            return keys.mean(2, dtype=dtype), values.mean(2, dtype=dtype)
        weights = scores.to(dtype).softmax(2)[..., None]
        return (weights * keys).sum(2), (weights * values).sum(2)


def middles(axis: Axis, span: int) -> Tensor:
    """Sequence index, int64 `[batch, slots]`, of the token in the middle of each span: where a summary is said to be.

    An empty slot gets an index too, within the sequence of slots * span tokens or more.
    """
    return axis.origin.long() + axis.start + torch.where(axis.end > axis.start, span // 2, -1)


def _cut(x: Tensor, axis: Axis, span: int, unit: int) -> Tensor:
    """`[batch, pieces, ...]` -> `[batch, slots, span / unit, ...]`: the pieces of every span, zeros in empty slots."""
    pieces = span // unit
    if axis.key is not None:  # without documents, spans lie one behind the other
        return x[:, : axis.length * pieces].unflatten(1, (axis.length, pieces))
    # A piece's own slot is its beginning's, so those of a span are neighbours on the finer level, too.
    first = (axis.origin + axis.start).long() // unit
    index = (first[..., None] + torch.arange(pieces, device=x.device)).clamp(max=x.shape[1] - 1)
    index = index + torch.arange(x.shape[0], device=x.device)[:, None, None] * x.shape[1]
    taken = x.flatten(0, 1).index_select(0, index.flatten()).view(*index.shape, *x.shape[2:])
    # What lies behind an empty slot may be of another document, and NaN: it gets no gradient either.
    whole = (axis.end > axis.start).view(*axis.start.shape, *[1] * (taken.dim() - 2))
    return torch.where(whole, taken, 0.0)

"""Joins the results of attention over disjoint sets of keys into one softmax."""

from collections.abc import Sequence

import torch
from torch import Tensor

from kernels.backends.masked_product import all_finite
from kernels.shapes import computes


def add_sinks(out: Tensor, lse: Tensor, sink_logits: Tensor) -> tuple[Tensor, Tensor]:
    """Adds one score per head, `sink_logits` `[heads]`, to a softmax; a sink has no value (gpt-oss).

    out `[batch, heads, queries, head_dim]` and lse `[batch, heads, queries]` come from attention(), or from merge() if
    the softmax has several parts, since sinks are added once. ValueError: sink_logits of another shape.
    """
    if sink_logits.shape != out.shape[1:2]:
        raise ValueError(f"sink_logits {tuple(sink_logits.shape)}: must be [{out.shape[1]}]")
    total = torch.logaddexp(lse, sink_logits.to(lse.dtype)[:, None])
    return out * (lse - total).exp()[..., None].to(out.dtype), total


def merge(parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """One softmax over the union of disjoint key sets, from the (out, lse) of each.

    out `[..., head_dim]`, lse `[...]`; exact: with LSE = logsumexp(lse_i), out = sum of out_i * exp(lse_i - LSE) (the
    combination step of FlashAttention, Dao et al. 2022). A part whose lse is -inf has no weight; where all are, the
    result is 0 and -inf. On a CPU such a part's out may be NaN; on a GPU it must be finite, as attention() returns it.
    """
    if not parts:
        raise ValueError("merge() of nothing: it needs at least one (out, lse)")
    lses = torch.stack([lse for _, lse in parts])
    highest = lses.detach().amax(0)
    highest = torch.where(highest == -torch.inf, 0.0, highest)
    weights = (lses - highest).exp()
    total = weights.sum(0)
    seen = total != 0  # a NaN is seen
    total = torch.where(seen, total, 1.0)
    outs = (_where_seen(out, lse) for out, lse in parts)
    out = sum(out * (weight / total)[..., None].to(out.dtype) for out, weight in zip(outs, weights, strict=True))
    return out, torch.where(seen, total.log() + highest, -torch.inf)


def _where_seen(out: Tensor, lse: Tensor) -> Tensor:
    """out with 0 where lse is -inf, since 0 * NaN would be NaN.

    On a GPU it returns out as it is: the kernels have written the zeros, and another pass over out costs time. Fake
    tensors, by which memory is forecast, count as finite.
    """
    is_fake = not computes(out) and not torch.compiler.is_compiling()
    if out.is_cuda or is_fake or (computes(out) and all_finite(out)):
        return out
    return torch.where((lse == -torch.inf)[..., None], 0.0, out)

"""Joins the results of attention over disjoint sets of keys into one softmax."""

from collections.abc import Sequence

import torch
from torch import Tensor

from kernels.backends.masked_product import all_finite
from kernels.shapes import is_concrete


def add_sinks(out: Tensor, lse: Tensor, sink_logits: Tensor) -> tuple[Tensor, Tensor]:
    """Adds one score per head, `sink_logits` `[heads]`, to a softmax; a sink has no value (gpt-oss).

    out `[batch, heads, queries, head_dim]` and lse `[batch, heads, queries]` come from attention(), or from merge() if
    there are several key sets, since sinks are added once. ValueError: sink_logits of another shape.
    """
    if sink_logits.shape != out.shape[1:2]:
        raise ValueError(f"sink_logits {tuple(sink_logits.shape)}: must be [{out.shape[1]}]")
    total = torch.logaddexp(lse, sink_logits.to(lse.dtype)[:, None])
    return out * (lse - total).exp()[..., None].to(out.dtype), total


def merge(results: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """One softmax over the union of disjoint key sets, from the (out, lse) of each.

    out `[..., head_dim]`, lse `[...]`; exact: with LSE = logsumexp(lse_i), out = sum of out_i * exp(lse_i - LSE) (the
    combination step of FlashAttention, Dao et al. 2022). An entry with lse -inf has no weight; where all are -inf, the
    result is 0 and -inf. The out of such an entry may be NaN on a CPU; on a GPU it must be finite, as attention()
    returns it. ValueError: no results.
    """
    if not results:
        raise ValueError("results=[]: must hold at least one (out, lse)")
    lses = torch.stack([lse for _, lse in results])
    highest = lses.detach().amax(0)
    highest = torch.where(highest == -torch.inf, 0.0, highest)
    weights = (lses - highest).exp()
    total = weights.sum(0)
    seen = total != 0  # True for NaN, too
    total = torch.where(seen, total, 1.0)
    outs = (_zero_unseen(out, lse) for out, lse in results)
    out = sum(out * (weight / total)[..., None].to(out.dtype) for out, weight in zip(outs, weights, strict=True))
    return out, torch.where(seen, total.log() + highest, -torch.inf)


def _zero_unseen(out: Tensor, lse: Tensor) -> Tensor:
    """Returns out with 0 where lse is -inf, since 0 * NaN is NaN.

    On a GPU out is returned unchanged: the kernels write the zeros, and another pass over out costs time. Fake tensors
    (memory forecasts) count as finite.
    """
    is_fake = not is_concrete(out) and not torch.compiler.is_compiling()
    if out.is_cuda or is_fake or (is_concrete(out) and all_finite(out)):
        return out
    return torch.where((lse == -torch.inf)[..., None], 0.0, out)

"""Attention of the few new tokens of a decoding step to keys in a cache.

    out, lse = decode_attention(q, [CachedKeys(k, v, mask), CachedKeys(stored_k, stored_v, stored_mask, slots, count)])

Keys need not be gathered: CachedKeys lists the slots, or pages of slots, that hold them, and a kernel reads only those.
Sizes follow from shapes, and lengths are tensors on the device, so the CUDA graph of a step serves every length.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from kernels import dispatch, selfcheck
from kernels.backends import direct
from kernels.layout.cached_keys import MAX_QUERIES, CachedKeys
from kernels.shapes import require
from kernels.softmax import add_sinks


def decode_attention(
    q: Tensor,
    key_sets: Sequence[CachedKeys],
    *,
    scale: float | None = None,
    sink_logits: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """One softmax of q `[batch, heads, queries, head_dim]` over the keys of all `key_sets`; not differentiable.

    `scale` (default 1 / sqrt(head_dim)), `sink_logits` `[heads]` and the results (out, lse) are those of
    kernels.attention; deterministic. `backend`: "direct" is plain PyTorch, for any number of queries; "triton" splits
    the keys among the programs of a GPU and merges by log-sum-exp ("flash decoding", Dao et al. 2023), for up to
    MAX_QUERIES; "auto" uses triton if it can serve the call. ValueError: shapes or the backend do not fit.
    """
    _check(q, key_sets, sink_logits)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    backend = choose_backend(q, backend)
    if backend == "direct":
        out, lse = direct.attend(q, key_sets, scale)
        return (out, lse) if sink_logits is None else add_sinks(out, lse, sink_logits)
    if q.is_cuda and not torch.compiler.is_compiling():
        group = q.shape[1] // key_sets[0].k.shape[1]
        selfcheck.check_decoding(selfcheck.Problem(q.device, q.dtype, q.shape[-1], group))
    k, v, mask, slots, count, page = (list(each) for each in zip(*key_sets, strict=True))
    return torch.ops.farsight.decode_attention(q, k, v, mask, slots, count, page, scale, sink_logits)


def choose_backend(q: Tensor, backend: str = "auto") -> str:
    """The backend that serves q `[batch, heads, queries, head_dim]`. ValueError: the named one cannot serve it."""
    arguments = (q.device.type, q.dtype, q.shape[-1], q.shape[2])
    refusal = lambda name: dispatch.triton_refusal("decode_attention", name, *arguments)  # noqa: E731
    log_choice = q.shape[2] <= MAX_QUERIES and not torch.compiler.is_compiling()
    return dispatch.choose("decode_attention", backend, q.is_cuda, refusal, log_choice)


def _check(q: Tensor, key_sets: Sequence[CachedKeys], sink_logits: Tensor | None) -> None:
    require(len(key_sets) > 0, "key_sets=[]: must hold at least one CachedKeys")
    require(q.dim() == 4, f"q has {q.dim()} dimensions: must be 4")
    batch, heads, queries, head_dim = q.shape
    if sink_logits is not None:
        require(sink_logits.shape == (heads,), f"sink_logits {tuple(sink_logits.shape)}: must be [{heads}]")
    for keys in key_sets:
        k, mask = keys.k, keys.mask
        require(k.shape == keys.v.shape, f"k {tuple(k.shape)} and v {tuple(keys.v.shape)}: must have the same shape")
        fits = k.dim() == 4 and k.shape[0] == batch and k.shape[3] == head_dim and heads % k.shape[1] == 0
        require(fits, f"k {tuple(k.shape)}: must be [{batch}, a divisor of {heads}, slots, {head_dim}]")
        kv_heads = key_sets[0].k.shape[1]
        require(k.shape[1] == kv_heads, f"k has {k.shape[1]} KV heads: must be the first key set's, {kv_heads}")
        dtypes = f"q, k, v are {q.dtype}, {k.dtype}, {keys.v.dtype}"
        require(q.dtype == k.dtype == keys.v.dtype, f"{dtypes}: must have the same dtype")
        head_groups = (1, k.shape[1], heads)
        fits = mask.dim() == 4 and mask.shape[0] in (1, batch) and mask.shape[1] in head_groups
        fits = fits and mask.shape[2] in (1, queries) and mask.dtype == torch.bool
        accepted = f"booleans [{batch} or 1, one of {head_groups}, {queries} or 1, entries]"
        require(fits, f"mask {mask.dtype} {tuple(mask.shape)}: must be {accepted}")
        if keys.slots is None:
            require(
                mask.shape[3] <= k.shape[2],
                f"mask has {mask.shape[3]} entries: must be at most k's, {k.shape[2]}",
            )
            continue
        slots = keys.slots
        fits = slots.dim() == 3 and slots.shape[0] in (1, batch) and slots.shape[1] in head_groups
        fits = fits and slots.shape[2] * keys.page == mask.shape[3]
        accepted = f"[{batch} or 1, one of {head_groups}, the mask's {mask.shape[3]} entries / the page, {keys.page}]"
        require(fits, f"slots {tuple(slots.shape)}: must be {accepted}")


@torch.library.custom_op("farsight::decode_attention", mutates_args=())
def _decode(
    q: Tensor,
    k: list[Tensor],
    v: list[Tensor],
    mask: list[Tensor],
    slots: list[Tensor | None],
    count: list[Tensor | None],
    page: list[int],
    scale: float,
    sink_logits: Tensor | None,
) -> tuple[Tensor, Tensor]:
    from kernels.backends.triton import decode

    key_sets = [CachedKeys(*each) for each in zip(k, v, mask, slots, count, page, strict=True)]
    with torch.autocast(q.device.type, enabled=False):
        return decode.forward(q, key_sets, scale, sink_logits)


@_decode.register_fake
def _(q, k, v, mask, slots, count, page, scale, sink_logits):
    return torch.empty_like(q), q.new_empty(q.shape[:-1], dtype=torch.float32)

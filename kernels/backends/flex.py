"""FlexAttention, the compiled sparse attention of PyTorch (Dong et al. 2024), on the same tiles, for comparison.

It compiles separate kernels for each pattern, and its block mask is quadratic: several times 4 bytes per pair of a
query block and a key block. Autograd differentiates it as a whole, so its passes cannot be combined with those of other
backends.
"""

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention
from torch.utils.weak import WeakIdKeyDictionary

from kernels.layout.block_layout import BlockLayout, Source

DTYPES = (torch.bfloat16, torch.float16)
HEAD_DIMS = (64, 128)
"""The sizes that the GPU tests cover."""

GRAPHS = 1024
"""Maximum number of graphs (pattern and shapes) per process. PyTorch's default is 8, beyond which it runs dense
attention."""


def unsupported(q: Tensor, k: Tensor, v: Tensor, layout: BlockLayout) -> str | None:
    """Why FlexAttention cannot serve this call, with what is accepted; None if it can."""
    if not q.is_cuda:
        return f"device {q.device.type}: must be cuda"
    if q.dtype not in DTYPES:
        return f"dtype {q.dtype}: must be one of {', '.join(map(str, DTYPES))}"
    if q.shape[-1] not in HEAD_DIMS:
        return f"head_dim {q.shape[-1]}: must be one of {', '.join(map(str, HEAD_DIMS))}"
    if layout.block != 128:  # FlexAttention's tiles must divide the layout's
        return f"block {layout.block}: must be 128"
    if layout.source is None:
        return "a layout without its pattern: must come from build_layout()"
    return None


def attention(
    q: Tensor, k: Tensor, v: Tensor, layout: BlockLayout, scale: float, with_lse: bool
) -> tuple[Tensor, Tensor | None]:
    """(out, lse), as `kernels.attention()` describes them, differentiable; lse only `with_lse`."""
    mask = block_mask(layout, q.shape[1] // k.shape[1])
    # The limit is raised, and hitting it is an error: beyond it FlexAttention would run as unfused dense attention.
    limits = dict(recompile_limit=GRAPHS, accumulated_recompile_limit=GRAPHS, fail_on_recompile_limit_hit=True)
    with torch._dynamo.config.patch(**limits):
        out, aux = _compiled(
            *(q, k, v),
            block_mask=mask,
            scale=scale,
            enable_gqa=q.shape[1] != k.shape[1],
            return_aux=AuxRequest(lse=with_lse),
            kernel_options={"BACKEND": "TRITON"},
        )
    return out, aux.lse


_compiled = torch.compile(flex_attention, dynamic=False)
_masks = WeakIdKeyDictionary()  # by the identity of a tensor of the layout, like the plans of the Triton backend


def block_mask(layout: BlockLayout, group: int) -> BlockMask:
    """The layout as a BlockMask for `group` query heads per KV head, built once per layout."""
    masks_by_group = _masks.setdefault(layout.rows.count, {})
    if group not in masks_by_group:
        masks_by_group[group] = _block_mask(layout, group)
    return masks_by_group[group]


def _block_mask(layout: BlockLayout, group: int) -> BlockMask:
    rows, columns = layout.rows, -(-layout.keys // layout.block)
    repeat = group if layout.heads > 1 else 1
    count, partial = (t.repeat_interleave(repeat, 1) for t in (rows.count, rows.partial))
    index = torch.arange(columns, device=layout.device)
    entry = (rows.start.repeat_interleave(repeat, 1)[..., None] + index).clamp(max=len(rows.blocks) - 1)
    blocks = rows.blocks[entry] if len(rows.blocks) else torch.zeros_like(entry)
    # The full tiles of a row follow its partial tiles.
    full = (entry + partial[..., None]).clamp(max=len(rows.blocks) - 1)
    full = rows.blocks[full] if len(rows.blocks) else torch.zeros_like(entry)
    lists = [
        torch.where(index < n[..., None], listed, 0).int() for n, listed in ((partial, blocks), (count - partial, full))
    ]
    return BlockMask.from_kv_blocks(
        *(partial, lists[0], (count - partial).int(), lists[1]),
        BLOCK_SIZE=layout.block,
        mask_mod=mask_mod(layout.source, group),
        seq_lengths=(layout.queries, layout.keys),
    )


def mask_mod(source: Source, group: int):
    """FlexAttention's `mask_mod` of the patterns: whether query q of sequence b and query head h sees key k."""
    patterns, queries, keys = source.patterns, source.queries, source.keys
    plain = queries.is_plain and keys.key == ("tokens", keys.length, 0)
    offset = queries.key[2] if plain else 0
    distinct = list(dict.fromkeys(patterns))

    def seen(h, query, key_start, key_end, query_origin, key_origin):
        visible = False
        for pattern in distinct:
            shift_q, shift_k = (query_origin, key_origin) if pattern.anchor == "sequence" else (0, 0)
            here = pattern.visible(query + shift_q, key_start + shift_k, key_end + shift_k)
            if len(distinct) > 1:
                heads = [index for index, other in enumerate(patterns) if other == pattern]
                of_head = h // group == heads[0]
                for head in heads[1:]:
                    of_head = of_head | (h // group == head)
                here = here & of_head
            visible = visible | here
        return visible

    def of_one_document(b, h, q, k):
        query = q + offset
        return (k <= query) & seen(h, query, k, k + 1, 0, 0)

    def of_packed_documents(b, h, q, k):
        at_q, at_k = b if queries.batch > 1 else 0, b if keys.batch > 1 else 0
        query, document = queries.start[at_q, q], queries.document[at_q, q]
        key_start, key_end = keys.start[at_k, k], keys.end[at_k, k]
        same = (document == keys.document[at_k, k]) & (document >= 0) & (key_end <= query + 1)
        return same & seen(h, query, key_start, key_end, queries.origin[at_q, q], keys.origin[at_k, k])

    return of_one_document if plain else of_packed_documents

"""Other implementations of attention on the same selection, as functions of q, k, v `[batch, heads, tokens, head_dim]`.

Each function returns the implementation of its name. It raises Unavailable, or ImportError, if that cannot serve the
case.
"""

from collections.abc import Callable
from typing import Any


class Unavailable(RuntimeError):
    """This peer cannot serve this case."""


def fla(selection: Any, heads: int) -> Callable:
    """fla-core's `parallel_nsa`, its selected branch alone. It needs groups of 16 or more query heads."""
    import torch
    from fla.ops.nsa import parallel_nsa

    if heads // selection.selectors < 16:
        raise Unavailable(f"groups of 16 or more query heads, not {heads // selection.selectors}")
    if selection.document_start.any():
        raise Unavailable("one document a sequence: it hides no tokens of a block in which a document begins")
    query = torch.arange(selection.queries, device="cuda")
    chosen = selection.chosen.transpose(1, 2).contiguous().long()
    # A query without any block would be NaN there: it gets its own block. These are the first two blocks' queries.
    chosen[..., 0] = torch.where(chosen[..., 0] < 0, (query // selection.block)[None, :, None], chosen[..., 0])

    def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        out = parallel_nsa(
            q, k, v, block_indices=chosen, block_counts=selection.slots, block_size=selection.block, window_size=0
        )
        return out.transpose(1, 2)

    return call


def flex(selection: Any, heads: int) -> Callable:
    """Compiled FlexAttention whose BlockMask holds the tiles of 128 x 128 with a chosen pair."""
    import torch
    from torch._functorch import config
    from torch.nn.attention.flex_attention import BlockMask, flex_attention

    config.donated_buffer = False  # its backward is timed apart from its forward
    batch, selectors, queries, block = selection.batch, selection.selectors, selection.queries, selection.block
    blocks = selection.keys // block
    if batch * selectors * queries * blocks > 1 << 32:
        raise Unavailable("its table of chosen (query, block) pairs would take more than 4 GiB")
    group, tiles, document_start = heads // selectors, queries // 128, selection.document_start
    seen = torch.zeros(batch, selectors, queries, blocks + 1, dtype=torch.bool, device="cuda")
    seen.scatter_(3, torch.where(selection.chosen < 0, blocks, selection.chosen).long(), True)
    seen = seen[..., :blocks].contiguous()
    tile = seen.view(batch, selectors, tiles, 128, tiles, -1).any(5).any(3)
    lists = tile.int().argsort(-1, descending=True, stable=True).int().repeat_interleave(group, 1)
    mask = BlockMask.from_kv_blocks(
        tile.sum(-1, dtype=torch.int32).repeat_interleave(group, 1),
        lists,
        BLOCK_SIZE=128,
        mask_mod=lambda b, h, q, k: seen[b, h // group, q, k // block] & (k >= document_start[b, q]),
    )
    compiled = torch.compile(flex_attention, dynamic=False)
    return lambda q, k, v: compiled(q, k, v, block_mask=mask, enable_gqa=True)


def dense(selection: Any, heads: int) -> Callable:
    """Dense causal attention, for comparison. Its TFLOP/s are over the selected pairs, too."""
    from torch.nn.functional import scaled_dot_product_attention

    return lambda q, k, v: scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

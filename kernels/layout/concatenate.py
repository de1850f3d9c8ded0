"""Concatenates layouts along the keys, for one softmax over several kinds of keys (tokens, then summaries).

The keys of each layout are padded to whole blocks, so its tiles only move by whole columns. The host never waits for
the device: sizes follow from those of the layouts.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.layout.axis import Axis
from kernels.layout.block_layout import FULL, BlockLayout, TileList, any_overflow


def concatenate(layouts: Sequence[BlockLayout]) -> BlockLayout:
    """The layout of the same queries over the concatenated keys of all `layouts`.

    Keys are ordered as by `concatenate_keys`: those of layout i begin at the sum of the earlier key counts, each
    rounded up to whole blocks. A batch or number of heads of 1 is broadcast. Raises ValueError if queries, block,
    device, batch or heads disagree.
    """
    if not layouts:
        raise ValueError("layouts=[]: must be at least one layout")
    first = layouts[0]
    batch, heads = max(each.batch for each in layouts), max(each.heads for each in layouts)
    for each in layouts:
        if (each.queries, each.block, each.device) != (first.queries, first.block, first.device):
            raise ValueError(
                f"a layout of {each.queries} queries and block {each.block} on {each.device}: must agree with the "
                f"first's, {first.queries}, {first.block} and {first.device}"
            )
        if each.batch not in (1, batch) or each.heads not in (1, heads):
            raise ValueError(f"a layout of batch {each.batch} and {each.heads} heads: must be 1 or {batch}, {heads}")

    blocks = [-(-each.keys // each.block) for each in layouts]
    column_offset = [sum(blocks[:i]) for i in range(len(layouts))]
    mask_offset = [sum(len(each.masks) for each in layouts[:i]) for i in range(len(layouts))]
    return BlockLayout(
        queries=first.queries,
        keys=sum(blocks) * first.block,
        block=first.block,
        rows=_merge_rows([each.rows for each in layouts], column_offset, mask_offset, batch, heads),
        columns=_append_columns([each.columns for each in layouts], mask_offset, batch, heads),
        masks=torch.cat([each.masks for each in layouts]),
        pairs=sum(each.pairs.expand(batch, heads) for each in layouts),
        overflow=any_overflow(layouts),
    )


def concatenate_keys(tensors: Sequence[Tensor], block: int) -> Tensor:
    """Concatenates keys or values `[batch, kv_heads, keys, head_dim]`, each padded with zeros to whole blocks, for
    `concatenate`."""
    return torch.cat([piece for tensor in tensors for piece in _padded(tensor, block)], 2)


def concatenate_axes(axes: Sequence[Axis], block: int) -> Axis:
    """The axis of the keys of `concatenate_keys`, whose padding has document -1.

    It serves backends that evaluate the pattern pair by pair. `build_layout` does not accept it, because documents do
    not rise along it.
    """
    batch = max(axis.batch for axis in axes)

    def join(name: str, padding: int) -> Tensor:
        expanded = lambda axis: getattr(axis, name).expand(batch, -1)  # noqa: E731
        return torch.cat([F.pad(expanded(axis), (0, -axis.length % block), value=padding) for axis in axes], -1)

    return Axis(join("start", 0), join("end", 0), join("document", -1), join("origin", 0))


def _padded(tensor: Tensor, block: int) -> list[Tensor]:
    padding = -tensor.shape[2] % block
    return [tensor, tensor.new_zeros(*tensor.shape[:2], padding, tensor.shape[3])] if padding else [tensor]


def _merge_rows(
    lists: Sequence[TileList], minor_offset: Sequence[int], mask_offset: Sequence[int], batch: int, heads: int
) -> TileList:
    """Each row lists the partial tiles of every layout, in order, then the full ones."""
    expand = lambda t: t.expand(batch, heads, -1).long()  # noqa: E731
    ranges = [tuple(map(expand, (each.start, each.count, each.partial))) for each in lists]
    entry_offset = [sum(each.blocks.numel() for each in lists[:i]) for i in range(len(lists))]
    # Segments `[batch, heads, rows, 2 x layouts]`: the partial or full tiles of one layout, in output order.
    source = [start + skip for (start, _, _), skip in zip(ranges, entry_offset, strict=True)]
    source += [begin + partial for begin, (_, _, partial) in zip(source, ranges, strict=True)]
    size = [partial for _, _, partial in ranges] + [count - partial for _, count, partial in ranges]
    source, size = torch.stack(source, -1), torch.stack(size, -1)

    # Upper bound of the entries: rows that shared a layout's entries get a copy each.
    capacity = sum(each.blocks.numel() * heads * (batch // each.start.shape[0]) for each in lists)
    ends = size.flatten().cumsum(0)
    entry = torch.arange(capacity, device=ends.device)
    segment = torch.searchsorted(ends, entry, right=True).clamp(max=len(ends) - 1)
    begins = (ends - size.flatten())[segment]
    blocks = torch.cat([each.blocks + skip for each, skip in zip(lists, minor_offset, strict=True)])
    tiles = torch.cat([_shift_tiles(each.tiles, skip) for each, skip in zip(lists, mask_offset, strict=True)])
    index = (source.flatten()[segment] + entry - begins).clamp(max=max(len(blocks) - 1, 0))

    count = size.sum(-1)
    start = ends.view(size.shape)[..., -1] - count
    partial = size[..., : len(lists)].sum(-1)
    return TileList(start.int(), count.int(), partial.int(), blocks[index], tiles[index])


def _append_columns(lists: Sequence[TileList], mask_offset: Sequence[int], batch: int, heads: int) -> TileList:
    """The columns of all layouts, one layout after the other."""
    entry_offset = [sum(each.blocks.numel() for each in lists[:i]) for i in range(len(lists))]
    join = lambda name: torch.cat([getattr(each, name).expand(batch, heads, -1) for each in lists], -1)  # noqa: E731
    starts = [each.start.expand(batch, heads, -1) + skip for each, skip in zip(lists, entry_offset, strict=True)]
    return TileList(
        start=torch.cat(starts, -1),
        count=join("count"),
        partial=join("partial"),
        blocks=torch.cat([each.blocks for each in lists]),
        tiles=torch.cat([_shift_tiles(each.tiles, skip) for each, skip in zip(lists, mask_offset, strict=True)]),
    )


def _shift_tiles(tiles: Tensor, masks_before: int) -> Tensor:
    return torch.where(tiles == FULL, FULL, tiles + masks_before)

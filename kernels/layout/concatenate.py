"""Layouts side by side: one attention call, one softmax, over several kinds of keys (tokens, then summaries, ...).

Each part's keys are padded to whole blocks, so that a tile stays a tile: a part's column of tiles just moves. Nothing
here asks the device for a value; sizes follow from those of the parts.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.layout.axis import Axis
from kernels.layout.block_layout import FULL, BlockLayout, TileList, any_overflow


def concatenate(layouts: Sequence[BlockLayout]) -> BlockLayout:
    """The layout of the same queries over the keys of all `layouts`, one part behind the other.

    Its keys are those of `concatenate_keys`: part i begins at the sum of the earlier parts' key counts, each rounded up
    to whole blocks. Batch and heads that are 1 in one part and more in another are shared. Raises ValueError where
    queries, block, batch or heads disagree.
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
        rows=_merge_lines([each.rows for each in layouts], column_offset, mask_offset, batch, heads),
        columns=_append_lines([each.columns for each in layouts], mask_offset, batch, heads),
        masks=torch.cat([each.masks for each in layouts]),
        pairs=sum(each.pairs.expand(batch, heads) for each in layouts),
        overflow=any_overflow(layouts),
    )


def concatenate_keys(parts: Sequence[Tensor], block: int) -> Tensor:
    """Keys or values `[batch, kv_heads, keys, head_dim]` of each part, as `concatenate` expects them: each padded with
    zeros to whole blocks."""
    return torch.cat([piece for part in parts for piece in _padded(part, block)], 2)


def concatenate_axes(parts: Sequence[Axis], block: int) -> Axis:
    """What the keys of `concatenate_keys` stand for: a key of padding is of no document. It is no axis to build a
    layout on (documents don't rise along it): it is for backends that ask the pattern pair by pair."""
    batch = max(part.batch for part in parts)

    def join(name: str, padding: int) -> Tensor:
        of_part = lambda part: getattr(part, name).expand(batch, -1)  # noqa: E731
        return torch.cat([F.pad(of_part(part), (0, -part.length % block), value=padding) for part in parts], -1)

    return Axis(join("start", 0), join("end", 0), join("document", -1), join("origin", 0))


def _padded(part: Tensor, block: int) -> list[Tensor]:
    padding = -part.shape[2] % block
    return [part, part.new_zeros(*part.shape[:2], padding, part.shape[3])] if padding else [part]


def _merge_lines(
    parts: Sequence[TileList], minor_offset: Sequence[int], mask_offset: Sequence[int], batch: int, heads: int
) -> TileList:
    """Each line holds every part's tiles: first those with a mask, part by part, then the full ones."""
    expand = lambda t: t.expand(batch, heads, -1).long()  # noqa: E731
    lists = [tuple(map(expand, (part.start, part.count, part.partial))) for part in parts]
    entry_offset = [sum(part.blocks.numel() for part in parts[:i]) for i in range(len(parts))]
    # Segments [batch, heads, lines, 2 x parts]: runs of entries of one part and one kind, in the order wanted.
    source = [start + skip for (start, _, _), skip in zip(lists, entry_offset, strict=True)]
    source += [begin + partial for begin, (_, _, partial) in zip(source, lists, strict=True)]
    size = [partial for _, _, partial in lists] + [count - partial for _, count, partial in lists]
    source, size = torch.stack(source, -1), torch.stack(size, -1)

    # A bound on the entries: lines that share a part's entries each get their own.
    capacity = sum(part.blocks.numel() * heads * (batch // part.start.shape[0]) for part in parts)
    ends = size.flatten().cumsum(0)
    entry = torch.arange(capacity, device=ends.device)
    segment = torch.searchsorted(ends, entry, right=True).clamp(max=len(ends) - 1)
    begins = (ends - size.flatten())[segment]
    blocks = torch.cat([part.blocks + skip for part, skip in zip(parts, minor_offset, strict=True)])
    tiles = torch.cat([_shifted(part.tiles, skip) for part, skip in zip(parts, mask_offset, strict=True)])
    index = (source.flatten()[segment] + entry - begins).clamp(max=max(len(blocks) - 1, 0))

    count = size.sum(-1)
    start = ends.view(size.shape)[..., -1] - count
    partial = size[..., : len(parts)].sum(-1)
    return TileList(start.int(), count.int(), partial.int(), blocks[index], tiles[index])


def _append_lines(parts: Sequence[TileList], mask_offset: Sequence[int], batch: int, heads: int) -> TileList:
    """The lines of one part behind those of another."""
    entry_offset = [sum(part.blocks.numel() for part in parts[:i]) for i in range(len(parts))]
    join = lambda name: torch.cat([getattr(part, name).expand(batch, heads, -1) for part in parts], -1)  # noqa: E731
    starts = [part.start.expand(batch, heads, -1) + skip for part, skip in zip(parts, entry_offset, strict=True)]
    return TileList(
        start=torch.cat(starts, -1),
        count=join("count"),
        partial=join("partial"),
        blocks=torch.cat([part.blocks for part in parts]),
        tiles=torch.cat([_shifted(part.tiles, skip) for part, skip in zip(parts, mask_offset, strict=True)]),
    )


def _shifted(tiles: Tensor, masks_before: int) -> Tensor:
    return torch.where(tiles == FULL, FULL, tiles + masks_before)

"""Tokens of spans that are not full yet. They wait until the span can become a summary, or a block's router key."""

from collections.abc import Sequence

import torch
from torch import Tensor

from model.kv_cache.step import Step


class Filled:
    """The spans of `span` tokens that a chunk fills. A span consists of `ratio` pieces of `finer` tokens each: tokens,
    or summaries of the next finer level.

    `before`, `new`, `units`: as Step.units for whole spans. `unit` int64 `[batch, units]`: indices of the filled spans.
    `source` int64 `[batch, units * ratio]`: for each piece of the filled spans, its index in the pending pieces
    followed by those of the chunk; None for single-piece chunks. `keep` int64 `[batch, pieces of the chunk]`: the
    pending place that each piece of the chunk is written to, -1 for none.
    """

    def __init__(self, step: Step, span: int, finer: int) -> None:
        self.before, self.new, self.units = step.units(span)
        self.ratio = span // finer
        before, new, most = step.units(finer)
        before, new = (torch.as_tensor(each, device=step.device) for each in (before, new))
        after = before + new
        self.pieces = step.chunk if finer == 1 else most
        self.sequence = torch.arange(len(before), device=step.device)[:, None]
        piece = before[:, None] + torch.arange(self.pieces, device=step.device)
        waits = piece < after[:, None]
        if self.pieces > 1:
            waits = waits & (piece >= (after // self.ratio * self.ratio)[:, None])
        self.keep = torch.where(waits, piece % self.ratio, -1)
        if not self.units:
            return
        self.unit = (before // self.ratio)[:, None] + torch.arange(self.units, device=step.device)
        self.source = None
        if self.pieces == 1:
            return
        piece = (self.unit[..., None] * self.ratio + torch.arange(self.ratio, device=step.device)).flatten(1)
        index = self.ratio + piece - before[:, None]
        self.source = torch.where(piece < before[:, None], piece % self.ratio, index)
        # A unit that is not filled may get any piece: it ends in the future, so that no query sees it.
        self.source = self.source.clamp(max=self.ratio + self.pieces - 1)


class Pending:
    """The entries of each sequence's unfinished span on one level, `[batch, ratio + 1, heads, dim]`. Entries that need
    not be kept are written to the last position, which is never read."""

    def __init__(self) -> None:
        self._held: tuple[Tensor, ...] | None = None

    def take(self, filled: Filled, pieces: Sequence[Tensor]) -> tuple[Tensor, ...] | None:
        """Returns the pieces of the filled spans and keeps the others. None: no span is filled.

        pieces: those of the chunk, one tensor per kind (keys, values), `[batch, pieces, heads, dim]`. The result has
        one tensor per kind, `[batch, units, ratio, heads, dim]`, and may be a view that the next call overwrites.
        """
        if self._held is None:
            self._held = tuple(x.new_zeros(len(x), filled.ratio + 1, *x.shape[2:]) for x in pieces)
        taken = None
        if filled.units and filled.source is not None:
            index = filled.source[..., None, None]
            joined = [torch.cat([held[:, :-1], x], 1) for held, x in zip(self._held, pieces, strict=True)]
            taken = tuple(x.gather(1, index.expand(-1, -1, *x.shape[2:])) for x in joined)
            taken = tuple(x.unflatten(1, (filled.units, filled.ratio)) for x in taken)
        for held, x in zip(self._held, pieces, strict=True):
            held[filled.sequence, filled.keep] = x  # -1: the last place
        if filled.units and filled.source is None:  # one unit at most
            taken = tuple(held[:, None, :-1] for held in self._held)
        return taken

    def tensors(self) -> list[Tensor]:
        """All tensors of the pending pieces."""
        return list(self._held or ())

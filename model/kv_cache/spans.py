"""Tokens of spans that are not full yet. They wait until the span can become a summary, or a block's router key."""

from collections.abc import Sequence

import torch
from torch import Tensor

from model.kv_cache.step import Step


class Filled:
    """Which spans of `span` tokens a chunk fills, and from which pieces of `finer` tokens.

    `before`, `new`, `units`: as Step.units, whole spans of each sequence before the chunk, and those that it fills.
    `unit` int64 `[batch, units]`: their numbers. `source` int64 `[batch, units * pieces a span]`: each piece's
    place among the pending ones and, behind them, the chunk's; None where the chunk is one piece, which a span of
    pending ones begins or goes on with. `keep` int64 `[batch, pieces of the chunk]`: where a piece waits that fills no
    span yet, or that is the only one; -1: nowhere.
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
        behind = self.ratio + piece - before[:, None]
        self.source = torch.where(piece < before[:, None], piece % self.ratio, behind)
        # Any piece will do for a unit that is not filled: it ends in the future, where nobody sees it.
        self.source = self.source.clamp(max=self.ratio + self.pieces - 1)


class Pending:
    """The pieces of a level's unfinished spans, `[batch, pieces a span, heads, dim]`, and one place more for what
    nobody will read."""

    def __init__(self) -> None:
        self._held: tuple[Tensor, ...] | None = None

    def take(self, filled: Filled, pieces: Sequence[Tensor]) -> tuple[Tensor, ...] | None:
        """Of each kind of pieces (keys and values), those of the filled spans, `[batch, units, ratio, heads, dim]`,
        which may be views of what is held; the others are kept. None where no span is filled."""
        if self._held is None:
            self._held = tuple(x.new_zeros(len(x), filled.ratio + 1, *x.shape[2:]) for x in pieces)
        taken = None
        if filled.units and filled.source is not None:
            index = filled.source[..., None, None]
            joined = [torch.cat([held[:, :-1], x], 1) for held, x in zip(self._held, pieces, strict=True)]
            taken = tuple(x.gather(1, index.expand(-1, -1, *x.shape[2:])) for x in joined)
            taken = tuple(x.unflatten(1, (filled.units, filled.ratio)) for x in taken)
        for held, x in zip(self._held, pieces, strict=True):
            held[filled.sequence, filled.keep] = x  # -1: the place more
        if filled.units and filled.source is None:  # one unit at most
            taken = tuple(held[:, None, :-1] for held in self._held)
        return taken

    def tensors(self) -> list[Tensor]:
        """All that it holds."""
        return list(self._held or ())

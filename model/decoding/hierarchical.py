"""The cache of a layer that attends hierarchically: tokens nearby, and summaries that are built as their spans fill.

Every level has a store of its own: the tokens a ring, each level of summaries one in units of its span, the coarsest a
list that grows by one summary a span. What a span has so far, and cannot be summarized yet, waits as `Pending` pieces:
tokens for the finest level of summaries, summaries of the finer level for the others.
"""

import torch
from torch import Tensor

from kernels import Axis
from kernels.decoding import Part
from kernels.patterns import Hierarchical
from kernels.pooling import pool
from model.attention import Inputs
from model.attention.hierarchical import HierarchicalAttend
from model.decoding.slots import Slots
from model.decoding.step import Step, attend_to_all
from model.decoding.store import Store
from model.rope import rotate


class HierarchicalBookkeeping:
    """What the layers of one pattern share."""

    def __init__(self, pattern: Hierarchical, batch: int, device: torch.device) -> None:
        self.levels = [Slots(level, batch, device, span=level.span) for level in pattern.levels]

    def look(self, step: Step) -> tuple:
        """(how the chunk sees itself, what it reads of each level, what it adds to each level of summaries, where each
        level's new keys go)."""
        own, reads = step.own(self.levels[0]), [step.read(level) for level in self.levels]
        filled, where = [], []
        for level, finer in zip(self.levels, [None, *self.levels], strict=False):
            before, new, most = step.units(level.span)
            units = step.chunk if finer is None else most
            if finer is not None:
                filled.append(Filled(step, level, finer, units))
            where.append(level.write(units, before, new) if units else None)
        return own, reads, filled, where


class Filled:
    """Which spans of a level a chunk fills, and from which pieces: tokens, or summaries of the `finer` level.

    `source` int64 `[batch, units * pieces a span]`: each piece's place among the pending ones and, behind them, the
    chunk's. `keep` int64 `[batch, pieces of the chunk]`: where a piece waits that fills no span yet; -1: nowhere.
    `mask`: which queries see the new summaries. `cos`, `sin`: of their rotation.
    """

    def __init__(self, step: Step, level: Slots, finer: Slots, units: int) -> None:
        self.units, self.ratio = units, level.span // finer.span
        before, new, most = step.units(finer.span)
        before, new = (torch.as_tensor(each, device=step.device) for each in (before, new))
        after = before + new
        self.pieces = step.chunk if finer.span == 1 else most
        offset = torch.arange(self.pieces, device=step.device)
        piece = before[:, None] + offset
        waits = (piece < after[:, None]) & (piece >= (after // self.ratio * self.ratio)[:, None])
        self.keep = torch.where(waits, piece % self.ratio, -1)
        if not units:
            return
        unit = (before // self.ratio)[:, None] + torch.arange(units, device=step.device)
        piece = (unit[..., None] * self.ratio + torch.arange(self.ratio, device=step.device)).flatten(1)
        behind = self.ratio + piece - before[:, None]
        self.source = torch.where(piece < before[:, None], piece % self.ratio, behind)
        # Any piece will do for a unit that is not filled: it ends in the future, where nobody sees it.
        self.source = self.source.clamp(max=self.ratio + self.pieces - 1)
        self.mask = level.visible(step.position, unit)
        self.cos, self.sin = step.rotary(unit * level.span + level.span // 2)


class Pending:
    """The pieces of a level's unfinished spans, `[batch, pieces a span, kv_heads, head_dim]`, and one place more for
    what nobody will read."""

    def __init__(self) -> None:
        self._held: tuple[Tensor, ...] | None = None

    def take(self, filled: Filled, pieces: tuple[Tensor, Tensor]) -> tuple[Tensor, ...] | None:
        """Keys and values of the pieces of the filled spans, `[batch, units * ratio, kv_heads, head_dim]`; the others
        are kept. None where no span is filled."""
        if self._held is None:
            self._held = tuple(x.new_zeros(len(x), filled.ratio + 1, *x.shape[2:]) for x in pieces)
        taken = None
        if filled.units:
            index = filled.source[..., None, None]
            joined = [torch.cat([held[:, :-1], x], 1) for held, x in zip(self._held, pieces, strict=True)]
            taken = tuple(x.gather(1, index.expand(-1, -1, *x.shape[2:])) for x in joined)
        keep = torch.where(filled.keep < 0, filled.ratio, filled.keep)
        batch = torch.arange(len(keep), device=keep.device)[:, None]
        for held, x in zip(self._held, pieces, strict=True):
            held[batch, keep] = x
        return taken

    def tensors(self) -> list[Tensor]:
        """All that it holds."""
        return list(self._held or ())


class HierarchicalCache:
    """One layer's: model.attention.Cached."""

    takes_fixed_steps = True

    def __init__(self, bookkeeping: HierarchicalBookkeeping) -> None:
        self.bookkeeping = bookkeeping
        self.stores = [Store(level) for level in bookkeeping.levels]
        self.step: Step | None = None
        self._pending = [Pending() for _ in bookkeeping.levels[1:]]

    def attend(self, inputs: Inputs, family: HierarchicalAttend) -> tuple[Tensor, Tensor]:
        own, reads, filled, where = self.step.once(self.bookkeeping, lambda: self.bookkeeping.look(self.step))
        k, v = inputs.k_BKTD, inputs.v_BKTD
        fresh = self._summarize(inputs, family, filled)
        past = [found for store, read in zip(self.stores, reads, strict=True) for found in store.read(read, k)]
        seen = [part for part in fresh if part is not None]
        found = attend_to_all(inputs.q_BHTD, Part(k, v, own), past, seen, family.backend)
        for store, part, slots in zip(self.stores, [Part(k, v, own), *fresh], where, strict=True):
            if part is not None:
                store.write(part.k, part.v, slots)
        return found

    def tensors(self) -> list[Tensor]:
        """All that it remembers."""
        return [tensor for part in (*self.stores, *self._pending) for tensor in part.tensors()]

    def _summarize(self, inputs: Inputs, family: HierarchicalAttend, filled: list[Filled]) -> list[Part | None]:
        """Each level's new summaries, None where it has none; as SummaryPool.forward makes them."""
        dtype, parts = inputs.v_BKTD.dtype, []
        pieces = inputs.unrotated_k_BTKD, inputs.v_BKTD.transpose(1, 2)
        for index, (level, pending) in enumerate(zip(filled, self._pending, strict=True)):
            taken = pending.take(level, pieces) if pieces is not None else None
            if taken is None:
                pieces = None
                parts.append(None)
                continue
            axis = Axis.summaries(Axis.tokens(level.units * level.ratio, device=taken[0].device), level.ratio)
            pieces = pool(*taken, family.pool.scores(index, taken[0]), axis, level.ratio)
            keys = rotate(pieces[0], level.cos, level.sin)
            parts.append(Part(keys.to(dtype).transpose(1, 2), pieces[1].to(dtype).transpose(1, 2), level.mask))
        return parts

"""What is made of whole spans of tokens, as they fill: pooled keys and values, or a router's key a block.

What a span has so far, and cannot be summarized yet, waits as `Pending` pieces: tokens for the finest level, summaries
of the finer level for the others. The summaries that queries attend to have a store a level, in units of its span.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from kernels.layout.cached_keys import CachedKeys
from kernels.patterns.hierarchical import Summaries
from kernels.summaries.span_pooling import pool_spans
from model.attention import Inputs
from model.attention.pooling import SummaryPool
from model.decoding.cache_layout import CacheLayout, Read
from model.decoding.step import Step
from model.decoding.store import Store
from model.rope import rotate


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


class NewSummaries(Filled):
    """And what attention needs to know of them: `mask`, which queries of the chunk see them; `cos`, `sin`, of their
    rotation."""

    def __init__(self, step: Step, slots: CacheLayout, finer: int) -> None:
        super().__init__(step, slots.span, finer)
        if self.units:
            self.mask = slots.visible(step.position, self.unit)
            self.cos, self.sin = step.rotary(self.unit * slots.span + slots.span // 2)


class SummaryCachePlanner:
    """What the layers of one pattern share of its levels of summaries, from fine to coarse."""

    def __init__(self, levels: Sequence[Summaries], batch: int, device: torch.device) -> None:
        self.levels = [CacheLayout(level, batch, device, span=level.span) for level in levels]

    def plan(self, step: Step) -> list[tuple[list[Read], NewSummaries, tuple[Tensor, Tensor] | None]]:
        """By level: what the chunk reads of it, what it adds to it, and where that goes."""
        found, finer = [], 1
        for slots in self.levels:
            reads, new = step.read(slots), NewSummaries(step, slots, finer)
            found.append((reads, new, slots.write(new.units, new.before, new.new) if new.units else None))
            finer = slots.span
        return found


class SummaryStores:
    """One layer's summaries."""

    def __init__(self, planner: SummaryCachePlanner) -> None:
        self.stores = [Store(slots) for slots in planner.levels]
        self._pending = [Pending() for _ in planner.levels]

    def make(
        self, inputs: Inputs, pool: SummaryPool, planned: list
    ) -> tuple[list[tuple[Read, CachedKeys]], list[CachedKeys]]:
        """(what the chunk reads of earlier summaries, the summaries that it fills): to `write` when both are used."""
        reads, v = zip(self.stores, planned, strict=True), inputs.v_BKTD
        past = [part for store, (read, *_) in reads for part in store.read(read, v)]
        return past, self._summarize(inputs, pool, [new for _, new, _ in planned])

    def write(self, fresh: list[CachedKeys], planned: list) -> None:
        """Keeps the new summaries. What was read is a view, so that it must not be needed any more."""
        for store, part, (*_, where) in zip(self.stores, fresh, planned, strict=False):
            store.write(part.k, part.v, where)

    def tensors(self) -> list[Tensor]:
        """All that it remembers."""
        return [tensor for part in (*self.stores, *self._pending) for tensor in part.tensors()]

    def _summarize(self, inputs: Inputs, summary_pool: SummaryPool, filled: list[NewSummaries]) -> list[CachedKeys]:
        """The new summaries of the levels that have any (the finest), as SummaryPool.forward makes them."""
        dtype, parts = inputs.v_BKTD.dtype, []
        pieces = inputs.unrotated_k_BTKD, inputs.v_BKTD.transpose(1, 2)
        for index, (level, pending) in enumerate(zip(filled, self._pending, strict=True)):
            taken = pending.take(level, pieces)
            if taken is None:
                break
            pieces = pool_spans(*taken, summary_pool.scores(index, taken[0]))
            keys = rotate(pieces[0], level.cos, level.sin)
            parts.append(CachedKeys(keys.to(dtype).transpose(1, 2), pieces[1].to(dtype).transpose(1, 2), level.mask))
        return parts

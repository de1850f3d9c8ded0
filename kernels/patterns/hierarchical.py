"""Hierarchical attention: exact tokens nearby, summaries of growing spans further away.

A query's scope loses resolution with distance, as in H-Transformer-1D (Zhu and Soricut 2021), with the summaries of
NSA's compressed branch (Yuan et al. 2025). The levels cut a document's past at boundaries that they share:

    0 ............ b2 ............ b1 ............ b0 ......... query
      spans[2] each   spans[1] each   spans[0] each   every token

with b_i = (query - reach_i + 1), rounded down to a multiple of spans[i], where reach_0 is the window. Spans count from
the document's start and each is a multiple of the finer one, so b2 <= b1 <= b0 lie on span boundaries of both levels
that meet there: every past token is covered exactly once. And only *whole* spans of the past are ever needed: the last
summaries end at b0 <= query + 1, so a document's ragged tail is seen as tokens, by queries that are in it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kernels.patterns.base import DecodeCost, Pattern, keys_of_masks, require, require_int

POOLINGS = ("mean", "learned")


@dataclass(frozen=True)
class Summaries(Pattern):
    """The summaries of `span` tokens (1: the tokens themselves) in a part of the past; the key axis is one of spans.

    Seen are the whole spans that end at or before (query - `beyond` + 1), rounded down to a multiple of `span`: with
    `beyond` 0, all that lie in the past. `reach` leaves out what begins before (query - `reach` + 1), rounded down to a
    multiple of `rounding`, the next level's span. Keys of another length (the empty ones of `Axis.summaries` among
    them) are not seen.
    """

    span: int
    beyond: int = 0
    reach: int | None = None
    rounding: int = 1

    is_mask: ClassVar[bool] = False

    def __post_init__(self) -> None:
        require_int("span", self.span, 1)
        require_int("beyond", self.beyond, 0)
        require_int("rounding", self.rounding, 1)
        if self.reach is not None:
            require_int("reach", self.reach, 1)

    @property
    def horizon(self) -> int | None:
        return None if self.reach is None else self.reach + self.rounding - 1

    def decode_cost(self, context: int, group: int = 1) -> DecodeCost:
        return keys_of_masks([self], context, self.span)

    def visible(self, query: Tensor, key_start: Tensor, key_end: Tensor) -> Tensor:
        seen = (key_end - key_start == self.span) & (key_end <= self._stop(query))
        return seen if self.reach is None else seen & (key_start >= self._start(query))

    def candidates(self, query_start: Tensor, query_stop: Tensor, length: int, block: int) -> tuple[Tensor, Tensor]:
        start = torch.zeros_like(query_start) if self.reach is None else self._start(query_start)
        return start[..., None], self._stop(query_stop - 1)[..., None]

    def _start(self, query: Tensor) -> Tensor:
        return (query - (self.reach - 1)) // self.rounding * self.rounding

    def _stop(self, query: Tensor) -> Tensor:
        return (query - (self.beyond - 1)) // self.span * self.span


@dataclass(frozen=True)
class Hierarchical(Pattern):
    """At least the last `window` tokens; before them, summaries of `spans[0]` tokens back to `reaches[0]`, of
    `spans[1]` back to `reaches[1]`, and so on; those of the last span reach back to the document's start.

    `spans` rise, each a multiple of the one before; `reaches` (one fewer) rise from the window. `pooling` is how a
    span's keys and values become one: their "mean", or a "learned" attention pool (model/attention/pooling.py).
    """

    window: int
    spans: tuple[int, ...]
    reaches: tuple[int, ...]
    pooling: str

    is_mask: ClassVar[bool] = False

    def __post_init__(self) -> None:
        for name in ("spans", "reaches"):  # a config's lists, made hashable
            value = getattr(self, name)
            require(_are_ints(value), name, value, "a list of whole numbers")
            object.__setattr__(self, name, tuple(value))
        require_int("window", self.window, 1)
        steps = zip((1, *self.spans), self.spans, strict=False)
        rising = all(span > finer and span % finer == 0 for finer, span in steps)
        require(len(self.spans) > 0 and rising, "spans", list(self.spans), "from 2, each a multiple of the one before")
        fewer = len(self.spans) - 1
        require(len(self.reaches) == fewer, "reaches", list(self.reaches), f"one fewer than spans ({fewer})")
        rising = all(reach > nearer for nearer, reach in zip((self.window, *self.reaches), self.reaches, strict=False))
        require(rising, "reaches", list(self.reaches), f"rising, and beyond the window ({self.window})")
        require(self.pooling in POOLINGS, "pooling", self.pooling, f"one of {', '.join(POOLINGS)}")

    @property
    def levels(self) -> tuple[Summaries, ...]:
        """The tokens' level, then one a span: disjoint, and together all of the past."""
        reaches = (self.window, *self.reaches, None)
        return tuple(
            Summaries(span, beyond, reach, rounding)
            for span, beyond, reach, rounding in zip(
                (1, *self.spans), (0, *reaches), reaches, (*self.spans, 1), strict=False
            )
        )

    @property
    def edges(self) -> tuple[int, ...]:
        return self.window, *self.spans, *self.reaches

    def decode_cost(self, context: int, group: int = 1) -> DecodeCost:
        """The summaries of every level are keys."""
        levels = [level.decode_cost(context) for level in self.levels]
        return DecodeCost(sum(each.stored for each in levels), sum(each.read for each in levels))

    def visible(self, query: Tensor, key_start: Tensor, key_end: Tensor) -> Tensor:
        tokens, *summaries = self.levels
        seen = tokens.visible(query, key_start, key_end)
        for level in summaries:
            seen = seen | level.visible(query, key_start, key_end)
        return seen

    def candidates(self, query_start: Tensor, query_stop: Tensor, length: int, block: int) -> tuple[Tensor, Tensor]:
        intervals = [level.candidates(query_start, query_stop, length, block) for level in self.levels]
        starts, stops = zip(*intervals, strict=True)
        return torch.cat(starts, -1), torch.cat(stops, -1)


def _are_ints(value: object) -> bool:
    if not isinstance(value, Sequence) or isinstance(value, str):
        return False
    return all(isinstance(each, int) and not isinstance(each, bool) for each in value)

"""Hierarchical attention: nearby tokens exactly, distant tokens as summaries of growing spans.

Resolution falls with distance, as in H-Transformer-1D (Zhu and Soricut 2021); the summaries are those of NSA's
compressed branch (Yuan et al. 2025). The levels divide a document's past at shared boundaries:

    0 ............ b2 ............ b1 ............ b0 ......... query
      spans[2] each   spans[1] each   spans[0] each   every token

Boundary b_i is (query - reach_i + 1), rounded down to a multiple of spans[i]; reach_0 is the window. Spans are counted
from the document's start and each is a multiple of the finer one, so every b_i is a boundary of both adjacent levels,
and every past token is covered exactly once. Only *complete* spans are summarized: the last summary ends at b0 <= query
+ 1, and the incomplete span at a document's end is visible as tokens, to the queries within it.
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
    """One level: the summaries of `span` tokens each (1: the tokens themselves) in an interval of the past.

    A query sees the keys of exactly `span` tokens that end at or before (query - `beyond` + 1), rounded down to a
    multiple of `span`; with `beyond` 0 these are all complete spans of the past. `reach` limits the distance: visible
    keys begin at or after (query - `reach` + 1), rounded down to a multiple of `rounding`, the next level's span. Keys
    of any other length are hidden, the empty entries of `Axis.summaries` among them.
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
    """At least the last `window` tokens, and before them summaries of spans that grow with the distance.

    Summaries of `spans[0]` tokens reach back to `reaches[0]`, those of `spans[1]` to `reaches[1]`, and so on; those of
    the last span reach back to the document's start. Each span is a multiple of the one before. `reaches` has one entry
    fewer than `spans`; its entries rise and exceed the window. `pooling`: a span's keys and values are their "mean", or
    the output of a "learned" attention pool (model/attention/pooling.py).
    """

    window: int
    spans: tuple[int, ...]
    reaches: tuple[int, ...]
    pooling: str

    is_mask: ClassVar[bool] = False

    def __post_init__(self) -> None:
        for name in ("spans", "reaches"):  # YAML gives lists; tuples are hashable
            value = getattr(self, name)
            require(_are_ints(value), name, value, "a list of integers")
            object.__setattr__(self, name, tuple(value))
        require_int("window", self.window, 1)
        steps = zip((1, *self.spans), self.spans, strict=False)
        rising = all(span > finer and span % finer == 0 for finer, span in steps)
        require(
            len(self.spans) > 0 and rising,
            "spans",
            list(self.spans),
            "integers >= 2, each a multiple of the one before",
        )
        fewer = len(self.spans) - 1
        require(len(self.reaches) == fewer, "reaches", list(self.reaches), f"one fewer than spans ({fewer})")
        rising = all(reach > nearer for nearer, reach in zip((self.window, *self.reaches), self.reaches, strict=False))
        require(rising, "reaches", list(self.reaches), f"rising and greater than the window ({self.window})")
        require(self.pooling in POOLINGS, "pooling", self.pooling, f"one of {', '.join(POOLINGS)}")

    @property
    def levels(self) -> tuple[Summaries, ...]:
        """The level of tokens, then one level per span; together they cover every past token once."""
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
        """Counts the keys of all levels."""
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

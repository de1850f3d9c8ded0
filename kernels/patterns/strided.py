"""Strided and fixed access: the two factorized patterns of the Sparse Transformer (Child et al. 2019).

A query sees its recent past and *columns*: keys at fixed positions that every later query sees. Information reaches
any distance in two layers through them.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.patterns.base import Pattern, require, require_align, require_int


@dataclass(frozen=True)
class Strided(Pattern):
    """A local window of `window` tokens and the last `columns` tokens of every `stride`.

    Positions are divided into strides of `stride` tokens; every later query sees the last `columns` of each. If
    `stride` and `columns` are multiples of the tile (128), the columns fill whole tiles.
    """

    window: int
    stride: int
    columns: int = 1
    align: str = "document"

    def __post_init__(self) -> None:
        require_int("window", self.window, 1)
        require_int("stride", self.stride, 1)
        require_int("columns", self.columns, 1)
        require(self.columns <= self.stride, "columns", self.columns, f"at most the stride ({self.stride})")
        require_align(self.align)

    @property
    def horizon(self) -> int:
        return self.window

    def persistent(self, key_start: Tensor) -> Tensor:
        return _in_column(key_start + 1, self.stride, self.columns)

    @property
    def edges(self) -> tuple[int, ...]:
        return self.window, self.stride

    def visible(self, query: Tensor, key_start: Tensor, key_end: Tensor) -> Tensor:
        near = query - key_start < self.window
        return near | _in_column(key_end, self.stride, self.columns)

    def candidates(self, query_start: Tensor, query_stop: Tensor, length: int, block: int) -> tuple[Tensor, Tensor]:
        near = (query_start - (self.window - 1))[..., None], query_stop[..., None]
        return _join(near, _column_intervals(query_stop, self.stride, self.columns, length))


@dataclass(frozen=True)
class Fixed(Pattern):
    """A query sees its own segment, and the last `summary` tokens of every earlier segment of `segment` tokens."""

    segment: int
    summary: int
    align: str = "document"

    def __post_init__(self) -> None:
        require_int("segment", self.segment, 1)
        require_int("summary", self.summary, 1)
        require(self.summary <= self.segment, "summary", self.summary, f"at most the segment ({self.segment})")
        require_align(self.align)

    @property
    def horizon(self) -> int:
        return self.segment

    def persistent(self, key_start: Tensor) -> Tensor:
        return _in_column(key_start + 1, self.segment, self.summary)

    @property
    def edges(self) -> tuple[int, ...]:
        return (self.segment,)

    def visible(self, query: Tensor, key_start: Tensor, key_end: Tensor) -> Tensor:
        own = query // self.segment == key_start // self.segment
        return own | _in_column(key_end, self.segment, self.summary)

    def candidates(self, query_start: Tensor, query_stop: Tensor, length: int, block: int) -> tuple[Tensor, Tensor]:
        own = (query_start // self.segment * self.segment)[..., None], query_stop[..., None]
        return _join(own, _column_intervals(query_stop, self.segment, self.summary, length))


def _in_column(key_end: Tensor, stride: int, columns: int) -> Tensor:
    """Whether the key's last token is among the last `columns` of its stride."""
    return (key_end - 1) % stride >= stride - columns


def _column_intervals(query_stop: Tensor, stride: int, columns: int, length: int) -> tuple[Tensor, Tensor]:
    """The columns before `query_stop` as intervals `[..., length // stride + 1]`; those of later columns are empty."""
    strides = torch.arange(length // stride + 1, device=query_stop.device, dtype=query_stop.dtype)
    start = strides * stride + stride - columns
    stop = torch.minimum(start + columns, query_stop[..., None])
    return start.expand(stop.shape), stop


def _join(*intervals: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    starts, stops = zip(*intervals, strict=True)
    return torch.cat(starts, -1), torch.cat(stops, -1)

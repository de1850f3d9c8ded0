"""Windows: patterns of the distance between query and key, with optional sink tokens."""

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.patterns.base import Pattern, require_int


@dataclass(frozen=True)
class Window(Pattern):
    """Sliding window: each query sees the last `width` tokens, itself included, and the first `sink_tokens`.

    Longformer (Beltagy et al. 2020) and Mistral without sinks; StreamingLLM (Xiao et al. 2023) with them.
    """

    width: int
    sink_tokens: int = 0

    def __post_init__(self) -> None:
        require_int("width", self.width, 1)
        require_int("sink_tokens", self.sink_tokens, 0)

    @property
    def horizon(self) -> int:
        return self.width

    def persistent(self, key_start: Tensor) -> Tensor:
        return key_start < self.sink_tokens

    @property
    def edges(self) -> tuple[int, ...]:
        return (self.width,)

    def visible(self, query: Tensor, key_start: Tensor, key_end: Tensor) -> Tensor:
        near = query - key_start < self.width
        return near | (key_start < self.sink_tokens)

    def candidates(self, query_start: Tensor, query_stop: Tensor, length: int, block: int) -> tuple[Tensor, Tensor]:
        zero = torch.zeros_like(query_start)
        start = torch.stack([query_start - (self.width - 1), zero], -1)
        stop = torch.stack([query_stop, zero + self.sink_tokens], -1)
        return start, stop

    def plain_window(self, keys: int) -> int | None:
        return None if self.sink_tokens else self.width


@dataclass(frozen=True)
class Dilated(Pattern):
    """Dilated window: every `dilation`-th token back from the query, `width` of them, itself included.

    The reach is `width * dilation` tokens (Longformer, Beltagy et al. 2020; LongNet, Ding et al. 2023). The visible
    keys are spread over every tile of that reach, so a tile kernel computes `dilation` times more pairs than are
    visible: compare `density_tiles` with `density_pairs`.
    """

    width: int
    dilation: int

    def __post_init__(self) -> None:
        require_int("width", self.width, 1)
        require_int("dilation", self.dilation, 1)

    @property
    def horizon(self) -> int:
        return (self.width - 1) * self.dilation + 1

    @property
    def edges(self) -> tuple[int, ...]:
        return (self.width,)

    def visible(self, query: Tensor, key_start: Tensor, key_end: Tensor) -> Tensor:
        distance = query - key_start
        return (distance < self.width * self.dilation) & (distance % self.dilation == 0)

    def candidates(self, query_start: Tensor, query_stop: Tensor, length: int, block: int) -> tuple[Tensor, Tensor]:
        return (query_start - (self.width * self.dilation - 1))[..., None], query_stop[..., None]

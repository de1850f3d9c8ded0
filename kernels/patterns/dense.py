"""Full causal attention: the baseline of every comparison."""

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.patterns.base import Pattern


@dataclass(frozen=True)
class Dense(Pattern):
    """Every query sees every earlier token of its document (Vaswani et al. 2017, causal)."""

    def visible(self, query: Tensor, key_start: Tensor, key_end: Tensor) -> Tensor:
        return key_start <= query

    def candidates(self, query_start: Tensor, query_stop: Tensor, length: int, block: int) -> tuple[Tensor, Tensor]:
        return torch.zeros_like(query_start)[..., None], query_stop[..., None]

    def plain_window(self, keys: int) -> int | None:
        return keys

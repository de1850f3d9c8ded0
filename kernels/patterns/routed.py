"""Routed attention: a local window, and the past blocks that a router chooses for each query.

MoBA (Lu et al. 2025) scores blocks by their mean key, DeepSeek's sparse attention (DSA, 2025) and SeerAttention (Gao
et al. 2024) by a small learned indexer, and NSA (Yuan et al. 2025) adds a compressed branch. Blocks are chosen while a
layer runs (kernels/selection/routing.py), so `visible` marks every key that a router could choose.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from kernels.patterns.base import DecodeCost, Pattern, require, require_int
from kernels.patterns.hierarchical import Summaries
from kernels.shapes import BLOCK_SIZES

ROUTERS = ("mean_key", "indexer")
SHARING = ("group", "head")
POOLINGS = ("mean", "learned")
COMBINATIONS = ("lse", "gates")


@dataclass(frozen=True)
class LocalWindow(Pattern):
    """The last `window` tokens, extended back to the start of a block of `block` tokens of the packed sequence.

    Routed attention always sees this window. The blocks that a router may choose end where it begins.
    """

    window: int
    block: int

    @property
    def anchor(self) -> str:
        return "sequence"

    def visible(self, query: Tensor, key_start: Tensor, key_end: Tensor) -> Tensor:
        return key_start >= self._start(query)

    def candidates(self, query_start: Tensor, query_stop: Tensor, length: int, block: int) -> tuple[Tensor, Tensor]:
        return self._start(query_start)[..., None], query_stop[..., None]

    def _start(self, query: Tensor) -> Tensor:
        return torch.div(query - (self.window - 1), self.block, rounding_mode="floor") * self.block


@dataclass(frozen=True)
class Routed(Pattern):
    """At least the last `window` tokens, and `top_k` of the blocks of `block` tokens before them.

    `router`: how blocks are scored, "mean_key" (query · mean of the block's keys, no parameters) or "indexer" (learned
    projections to `indexer_dim`). `share`: a "group" of query heads shares one choice, or each "head" has its own.
    `first_block`: the document's first block is always visible as well.
    """

    window: int
    block: int
    top_k: int
    router: str
    share: str
    first_block: bool
    indexer_dim: int

    is_mask: ClassVar[bool] = False

    @property
    def anchor(self) -> str:
        return "sequence"  # blocks are counted in the packed sequence

    def __post_init__(self) -> None:
        require_int("window", self.window, 1)
        require(self.block in BLOCK_SIZES, "block", self.block, f"one of {', '.join(map(str, BLOCK_SIZES))}")
        require_int("top_k", self.top_k, 1)
        require(self.router in ROUTERS, "router", self.router, f"one of {', '.join(ROUTERS)}")
        require(self.share in SHARING, "share", self.share, f"one of {', '.join(SHARING)}")
        require(isinstance(self.first_block, bool), "first_block", self.first_block, "true or false")
        require_int("indexer_dim", self.indexer_dim, 1)

    @property
    def local(self) -> LocalWindow:
        """The local window; chosen blocks are added to it."""
        return LocalWindow(self.window, self.block)

    @property
    def slots(self) -> int:
        """Maximum number of blocks that a query attends to in addition to the window."""
        return self.top_k + self.first_block

    @property
    def edges(self) -> tuple[int, ...]:
        return (self.window,)

    def decode_cost(self, context: int, group: int = 1) -> DecodeCost:
        """The query reads the window, the selected blocks (those of all `group` query heads of a KV head, if each
        selects its own), and the router's key of every eligible block."""
        window = self.local.decode_cost(context)
        eligible = max(0, (context - (self.window - 1)) // self.block)
        selected = min(self.slots, eligible) * self.block * (group if self.share == "head" else 1)
        return DecodeCost(window.stored, window.read + selected, context // self.block, eligible)

    def visible(self, query: Tensor, key_start: Tensor, key_end: Tensor) -> Tensor:
        return key_start <= query

    def candidates(self, query_start: Tensor, query_stop: Tensor, length: int, block: int) -> tuple[Tensor, Tensor]:
        return torch.zeros_like(query_start)[..., None], query_stop[..., None]


@dataclass(frozen=True)
class NativeSparse(Routed):
    """Routed attention and summaries of all past spans of `summary_span` tokens: the three branches of NSA.

    `pooling`: the "mean" of a span's keys and values, or a "learned" attention pool. `combine`: the branches share one
    softmax ("lse"), or are summed with a sigmoid gate per query, head and branch ("gates", as published; the gates are
    one linear layer of the layer's input and begin near 0.5).

    In one softmax, a branch without a matching key gets little weight. Gates cannot shift weight between branches in
    this way: a chosen block without a matching key still adds its values. NSA gives each branch its own keys and values
    and chooses blocks by the summaries' attention. Here the branches share keys and values; with "gates", the router
    "mean_key" found the right blocks in some runs only, so use "indexer", which learns where its branch attends.
    """

    summary_span: int
    pooling: str
    combine: str

    def __post_init__(self) -> None:
        super().__post_init__()
        require_int("summary_span", self.summary_span, 2)
        require(self.pooling in POOLINGS, "pooling", self.pooling, f"one of {', '.join(POOLINGS)}")
        require(self.combine in COMBINATIONS, "combine", self.combine, f"one of {', '.join(COMBINATIONS)}")

    def decode_cost(self, context: int, group: int = 1) -> DecodeCost:
        routed, summaries = super().decode_cost(context, group), Summaries(self.summary_span).decode_cost(context)
        return replace(routed, stored=routed.stored + summaries.stored, read=routed.read + summaries.read)

"""The cache of routed attention: all tokens, and the router's key of every whole block.

The router's keys score the blocks. Of the tokens, the window and the chosen blocks are read.

kernels/selection/routing.py computes the scores, breaks ties and orders the chosen blocks, as in training.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels import Selection, attention, block_means, merge
from kernels.decoding.decode_attention import decode_attention
from kernels.layout.cached_keys import CachedKeys
from kernels.patterns import Routed
from kernels.patterns.hierarchical import Summaries
from kernels.selection.routing import choose, eligible_range
from kernels.selection.selected_attention import choose_backend
from model.attention.base import Inputs
from model.attention.layer_cache import LayerCache
from model.attention.masked.cache import MaskedCachePlanner
from model.attention.routed.core import Branch, RoutedAttention
from model.kv_cache.cache_layout import CacheLayout, Read
from model.kv_cache.chunk_attention import attend_to_all, attend_to_parts, nothing_seen
from model.kv_cache.spans import Filled, Pending
from model.kv_cache.step import MAX_UNTILED_TOKENS, Step
from model.kv_cache.store import Picks, Store
from model.rope import RotaryEmbedding

GATHERED_AT_ONCE = {"cpu": 1 << 21, "cuda": 1 << 26}
"""Number of elements of K that are gathered for one slice of queries."""


@dataclass(frozen=True, eq=False)
class RoutedStepPlan:
    """The plan of a step for all layers with one pattern.

    `own`, `reads`, `where`: as MaskedCachePlanner.plan, for the window. `filled`: the blocks that become whole; their
    router keys go to the slots `filled_where`. `limit`: as `eligible_range` of kernels/selection/routing.py. `most`: an
    upper bound of `limit` on the host.
    """

    own: object
    reads: list[Read]
    where: tuple[Tensor, Tensor]
    filled: Filled
    filled_where: tuple[Tensor, Tensor] | None
    limit: Tensor
    most: int


class RoutedCachePlanner:
    """The plan of a step, which the layers of one pattern share."""

    def __init__(self, pattern: Routed, batch: int, rotary: RotaryEmbedding) -> None:
        self.pattern = pattern
        self.tokens = MaskedCachePlanner(pattern.local, batch, rotary)
        self.blocks = CacheLayout(Summaries(pattern.block), batch, rotary.device, span=pattern.block)

    def plan(self, step: Step) -> RoutedStepPlan:
        pattern, filled = self.pattern, Filled(step, self.pattern.block, 1)
        where = self.blocks.write(filled.units, filled.before, filled.new) if filled.units else None
        query = step.position.int()
        _, limit = eligible_range(torch.zeros_like(query), pattern.window, pattern.block, query)
        most = max(0, (step.longest(self.tokens.layout) - pattern.window) // pattern.block)
        return RoutedStepPlan(*self.tokens.plan(step), filled, where, limit, most)


class RoutedCache(LayerCache):
    planner_class = RoutedCachePlanner

    def __init__(self, planner: RoutedCachePlanner) -> None:
        self.planner = planner
        self.tokens, self.router_keys = Store(planner.tokens.layout), Store(planner.blocks)
        self.stores = [self.tokens, self.router_keys]
        self._pending = Pending()

    def attend(self, inputs: Inputs, core: RoutedAttention) -> Branch:
        planned = self.step.once(self.planner, lambda: self.planner.plan(self.step))
        if self.step.chunk > 1:
            return merge(self.window_and_routed(inputs, core, planned))
        window, picked = self.keys_of_one_token(inputs, core, planned)
        return attend_to_parts(inputs.q_BHTD, [*window, *picked], core.backend)

    def keys_of_one_token(
        self, inputs: Inputs, core: RoutedAttention, planned: RoutedStepPlan
    ) -> tuple[list[CachedKeys], list[CachedKeys]]:
        """For one new token per sequence: adds it to the cache, and returns the keys of the window and those of the
        chosen blocks, in place."""
        k, v = inputs.k_BKTD, inputs.v_BKTD
        self.tokens.write(k, v, planned.where)
        self._keep_router_keys(core.router_keys(inputs), planned)
        chosen, block = self._choose(inputs, core, planned), self.planner.pattern.block
        window = [*(part for _, part in self.tokens.read(planned.reads, k)), CachedKeys(k, v, planned.own)]
        if not planned.most:
            return window, []
        kept = self.tokens.read_picks(Picks(chosen, block))
        entries = chosen.shape[3] * block
        seen = self.step.once(entries, lambda: torch.ones(1, 1, 1, entries, dtype=torch.bool, device=k.device))
        return window, [CachedKeys(*kept, seen, chosen[:, :, 0], page=block)]

    def window_and_routed(self, inputs: Inputs, core: RoutedAttention, planned: RoutedStepPlan) -> list[Branch]:
        """Attention to the window and to the chosen blocks; adds the chunk to the cache."""
        q, k, v = inputs.q_BHTD, inputs.k_BKTD, inputs.v_BKTD
        window = attend_to_all(q, CachedKeys(k, v, planned.own), self.tokens.read(planned.reads, k), [], core.backend)
        # The last queries of a chunk may choose its first blocks, so all blocks are read from the store.
        self.tokens.write(k, v, planned.where)
        self._keep_router_keys(core.router_keys(inputs), planned)
        return [window, self._attend_to_blocks(q, self._choose(inputs, core, planned), planned.most, core.backend)]

    def tensors(self) -> list[Tensor]:
        return [tensor for part in (*self.stores, self._pending) for tensor in part.tensors()]

    def _keep_router_keys(self, keys: Tensor, planned: RoutedStepPlan) -> None:
        taken = self._pending.take(planned.filled, [keys.transpose(1, 2)])
        if taken is not None:
            keys, block = taken[0].flatten(1, 2).transpose(1, 2), self.planner.pattern.block
            self.router_keys.write(block_means(keys, None, block), None, planned.filled_where)

    def _choose(self, inputs: Inputs, core: RoutedAttention, planned: RoutedStepPlan) -> Tensor:
        """As Selection.chosen, with no more choices per query than there are blocks."""
        pattern, queries = self.planner.pattern, core.router_queries(inputs)
        if not planned.most:
            return queries.new_empty((*queries.shape[:3], 0), dtype=torch.int32)
        with torch.autocast(queries.device.type, enabled=False):  # autocast must not round the scores
            keys, slots = self.router_keys.read_keys(planned.most), min(pattern.slots, planned.most)
            return choose(queries, keys, None, planned.limit, slots, pattern.first_block)

    def _attend_to_blocks(self, q: Tensor, chosen: Tensor, most: int, backend: str) -> Branch:
        if not most:
            return nothing_seen(q)
        block = self.planner.pattern.block
        k, v = (x[:, :, : most * block] for x in self.tokens.read_picks(Picks(chosen, block)))
        if q.shape[2] > MAX_UNTILED_TOKENS and (q.is_cuda or backend == "triton"):
            selection = Selection.from_chosen(chosen, k.shape[2], block)
            if choose_backend(q, selection, backend) == "triton":
                return attention(q, k, v, selection, return_lse=True, backend="triton")
        a_query = chosen[:, :, 0].numel() * block * q.shape[3]
        at_once, found = max(1, GATHERED_AT_ONCE[q.device.type] // a_query), []
        for first in range(0, q.shape[2], at_once):
            piece = slice(first, first + at_once)
            found.append(attend_to_picks(q[:, :, piece], self.tokens, Picks(chosen[:, :, piece], block)))
        return torch.cat([out for out, _ in found], 2), torch.cat([lse for _, lse in found], 2)


def attend_to_picks(q: Tensor, store: Store, picks: Picks) -> Branch:
    """Attention of a few queries, each to its own blocks and as a sequence of its own. It reads these blocks alone."""
    batch, heads, queries, head_dim = q.shape
    k, v = store.gather(picks)
    mask = (picks.blocks.transpose(1, 2) >= 0).repeat_interleave(picks.size, 3)[:, :, :, None]
    rows = q.transpose(1, 2).reshape(batch * queries, heads, 1, head_dim)
    out, lse = decode_attention(rows, [CachedKeys(*(x.flatten(0, 1) for x in (k, v, mask)))], backend="direct")
    return (
        out.view(batch, queries, heads, head_dim).transpose(1, 2),
        lse.view(batch, queries, heads).transpose(1, 2),
    )

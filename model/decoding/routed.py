"""The cache of a layer whose router picks blocks: all tokens are kept, and of them the window and the picked blocks are
read; beside them the router's key of every whole block, by which blocks are scored.

The scores, the rule for equal ones and the order of the picks are kernels/routing.py's own, as in training.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels import Selection, attention, block_means, merge
from kernels.patterns import Routed
from kernels.patterns.hierarchical import Summaries
from kernels.routing import choose, eligible_range
from kernels.selected import choose_backend
from model.attention import Inputs
from model.attention.routed import RoutedAttend
from model.decoding.direct import Part, attend
from model.decoding.plain import PlainBookkeeping
from model.decoding.slots import Read, Slots
from model.decoding.step import FEW, Step, attend_to_all, nothing_seen
from model.decoding.store import Store
from model.decoding.summaries import Filled, Pending

GATHERED_AT_ONCE = {"cpu": 1 << 21, "cuda": 1 << 26}
"""Elements of K in one piece of queries."""

Branch = tuple[Tensor, Tensor]
"""(out, lse) of attention to some keys."""


@dataclass(frozen=True, eq=False)
class Looked:
    """What a chunk asks of its layers. `own`, `reads`, `where`: of the window, as PlainBookkeeping.look. `filled`: the
    blocks that become whole, whose router keys go to the slots `filled_where`. `lowest`, `limit`: as
    kernels.routing.eligible_range; no query may pick from block `most` on, which is known without asking the device."""

    own: object
    reads: list[Read]
    where: tuple[Tensor, Tensor]
    filled: Filled
    filled_where: tuple[Tensor, Tensor] | None
    lowest: Tensor
    limit: Tensor
    most: int


class RoutedBookkeeping:
    """What the layers of one pattern share."""

    def __init__(self, pattern: Routed, batch: int, device: torch.device) -> None:
        self.pattern = pattern
        self.tokens = PlainBookkeeping(pattern.local, batch, device)
        self.blocks = Slots(Summaries(pattern.block), batch, device, span=pattern.block)

    def look(self, step: Step) -> Looked:
        pattern, filled = self.pattern, Filled(step, self.pattern.block, 1)
        where = self.blocks.write(filled.units, filled.before, filled.new) if filled.units else None
        query = step.position.int()
        lowest, limit = eligible_range(torch.zeros_like(query), pattern.window, pattern.block, query)
        last = max(length + new for length, new in zip(step.lengths, step.new, strict=True)) - 1
        most = max(0, (last - (pattern.window - 1)) // pattern.block)
        return Looked(*self.tokens.look(step), filled, where, lowest, limit, most)


class RoutedCache:
    """One layer's: model.attention.Cached."""

    def __init__(self, bookkeeping: RoutedBookkeeping) -> None:
        self.bookkeeping = bookkeeping
        self.tokens, self.router_keys = Store(bookkeeping.tokens.slots), Store(bookkeeping.blocks)
        self.stores = [self.tokens, self.router_keys]
        self.step: Step | None = None
        self._pending = Pending()

    def attend(self, inputs: Inputs, family: RoutedAttend) -> Branch:
        looked = self.step.once(self.bookkeeping, lambda: self.bookkeeping.look(self.step))
        return merge(self.window_and_routed(inputs, family, looked))

    def window_and_routed(self, inputs: Inputs, family: RoutedAttend, looked: Looked) -> list[Branch]:
        """Attention to the window, and to the picked blocks; the chunk's keys and values are kept."""
        q, k, v = inputs.q_BHTD, inputs.k_BKTD, inputs.v_BKTD
        window = attend_to_all(q, Part(k, v, looked.own), self.tokens.read(looked.reads), [], family.backend)
        # A chunk's last queries may pick its first blocks: all blocks are read from the store.
        self.tokens.write(k, v, looked.where)
        self._keep_router_keys(family.router_keys(inputs), looked)
        return [window, self._attend_to_blocks(q, self._choose(inputs, family, looked), looked.most, family.backend)]

    def _keep_router_keys(self, keys: Tensor, looked: Looked) -> None:
        taken = self._pending.take(looked.filled, [keys.transpose(1, 2)])
        if taken is not None:
            keys, block = taken[0].transpose(1, 2), self.bookkeeping.pattern.block
            first_key = torch.zeros(len(keys), keys.shape[2], dtype=torch.int32, device=keys.device)
            self.router_keys.write(block_means(keys, first_key, block), None, looked.filled_where)

    def _choose(self, inputs: Inputs, family: RoutedAttend, looked: Looked) -> Tensor:
        """As Selection.chosen, in no more slots than there are blocks to pick from."""
        pattern, queries = self.bookkeeping.pattern, family.router_queries(inputs)
        self.router_keys.keys_read = looked.most
        if not looked.most:
            return queries.new_empty((*queries.shape[:3], 0), dtype=torch.int32)
        with torch.autocast(queries.device.type, enabled=False):  # it must not round the scores
            keys, slots = self.router_keys.first(looked.most)[0], min(pattern.slots, looked.most)
            return choose(queries, keys, looked.lowest, looked.limit, slots, pattern.first_block)

    def _attend_to_blocks(self, q: Tensor, chosen: Tensor, most: int, backend: str) -> Branch:
        if not most:
            return nothing_seen(q)
        block, strategy = self.bookkeeping.pattern.block, self.bookkeeping.pattern.strategy
        k, v = self.tokens.first(most * block)
        self.tokens.keys_read += chosen[0].numel() * block // k.shape[1]
        if q.shape[2] > FEW and (q.is_cuda or backend == "triton"):
            selection = Selection.from_chosen(chosen, k.shape[2], block, strategy=strategy)
            if choose_backend(q, selection, backend) == "triton":
                return attention(q, k, v, selection, return_lse=True, backend="triton")
        a_query = chosen[:, :, 0].numel() * block * q.shape[3]
        at_once, found = max(1, GATHERED_AT_ONCE[q.device.type] // a_query), []
        for first in range(0, q.shape[2], at_once):
            piece = slice(first, first + at_once)
            found.append(attend_to_chosen(q[:, :, piece], self.tokens, chosen[:, :, piece], block))
        return torch.cat([out for out, _ in found], 2), torch.cat([lse for _, lse in found], 2)


def attend_to_chosen(q: Tensor, store: Store, chosen: Tensor, block: int) -> Branch:
    """Attention of few queries to their own blocks, which are all that is read: each query is a sequence of its own."""
    batch, heads, queries, head_dim = q.shape
    chosen = chosen.transpose(1, 2)
    k, v = store.read_blocks(chosen.clamp(min=0).long(), block)
    mask = (chosen >= 0).repeat_interleave(block, 3)[:, :, :, None]
    rows = q.transpose(1, 2).reshape(batch * queries, heads, 1, head_dim)
    out, lse = attend(rows, [Part(*(x.flatten(0, 1) for x in (k, v, mask)))], head_dim**-0.5)
    return (
        out.view(batch, queries, heads, head_dim).transpose(1, 2),
        lse.view(batch, queries, heads).transpose(1, 2),
    )

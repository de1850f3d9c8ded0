"""Where keys lie that a decoding step attends to."""

from typing import NamedTuple

from torch import Tensor

MAX_QUERIES = 16
"""Queries that Triton's kernel serves at most: every program reads its keys for all of them."""


class CachedKeys(NamedTuple):
    """Keys in one pair of tensors, and which of them each query sees.

    A *line* is what shares a list of keys: all heads (1 line), the query heads of a KV head (kv_heads), or a query head
    (heads); dimensions of size 1 serve all. An *entry* is a place in that list.
    """

    k: Tensor
    v: Tensor
    """`[batch, kv_heads, slots, head_dim]`, any strides but the last."""
    mask: Tensor
    """Booleans `[batch or 1, lines, queries or 1, entries]`: whether a query sees the key of an entry."""
    slots: Tensor | None = None
    """Integers `[batch or 1, lines, entries / page]`: the page of `page` slots in which so many entries lie, -1 for
    none, whose entries nobody sees; None: entry i is slot i."""
    count: Tensor | None = None
    """Integers `[batch]`: entries from here on are not looked at, as if hidden; None: all are."""
    page: int = 1

    def of(self, queries: slice) -> "CachedKeys":
        """For some of the queries."""
        return self if self.mask.shape[2] == 1 else self._replace(mask=self.mask[:, :, queries])

"""The keys in a cache that a decoding step attends to."""

from typing import NamedTuple

from torch import Tensor

MAX_QUERIES = 16
"""Queries that Triton's kernel serves at most: every program reads its keys for all of them."""


class CachedKeys(NamedTuple):
    """Keys and values in one pair of tensors, with the mask of each query.

    Heads that share a list of keys form a *line*: all heads (1 line), the query heads of one KV head (kv_heads lines),
    or one query head (heads lines). Dimensions of size 1 are shared. An *entry* is an index into that list.
    """

    k: Tensor
    v: Tensor
    """`[batch, kv_heads, slots, head_dim]`, any strides but the last."""
    mask: Tensor
    """Booleans `[batch or 1, lines, queries or 1, entries]`: whether a query sees the key of an entry."""
    slots: Tensor | None = None
    """Integers `[batch or 1, lines, entries / page]`: for every `page` entries the index of their page of `page` slots,
    or -1, which hides these entries. None: entry i is slot i."""
    count: Tensor | None = None
    """Integers `[batch]`: the number of entries in use; later ones are hidden. None: all are in use."""
    page: int = 1

    def of(self, queries: slice) -> "CachedKeys":
        """The same keys with the masks of some of the queries."""
        return self if self.mask.shape[2] == 1 else self._replace(mask=self.mask[:, :, queries])

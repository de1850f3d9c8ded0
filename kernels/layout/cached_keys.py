"""The keys in a cache that a decoding step attends to."""

from typing import NamedTuple

from torch import Tensor

MAX_QUERIES = 16
"""Maximum number of queries that the Triton kernel accepts: each program holds all of them while it reads its keys."""


class CachedKeys(NamedTuple):
    """Keys and values in one pair of tensors, with the mask of each query.

    The query heads that share a list of keys form a *head group*: all heads (1 group), the query heads of one KV head
    (kv_heads groups), or a single query head (heads groups). An *entry* is an index into the list. Dimensions of size 1
    are broadcast.
    """

    k: Tensor
    v: Tensor
    """`[batch, kv_heads, slots, head_dim]`. A last stride other than 1 costs a copy."""
    mask: Tensor
    """Booleans `[batch or 1, head groups, queries or 1, entries]`: whether a query sees the key of an entry."""
    slots: Tensor | None = None
    """Integers `[batch or 1, head groups, entries / page]`: the page of `page` consecutive slots that holds each `page`
    entries, or -1, which hides them. None: entry i is slot i."""
    count: Tensor | None = None
    """Integers `[batch]`: the number of entries in use; later ones are hidden. None: all are in use."""
    page: int = 1

    def for_queries(self, queries: slice) -> "CachedKeys":
        """The same keys with the masks of some of the queries."""
        return self if self.mask.shape[2] == 1 else self._replace(mask=self.mask[:, :, queries])

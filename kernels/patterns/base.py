"""The base class of patterns: rules that decide which keys a query may see.

A pattern is independent of tiles, devices and packed documents. It works with positions *within one document* and
defines which keys are visible (`visible`) and which intervals contain them (`candidates`). The layout builder adds that
a query sees only its own document and never the future.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor


@dataclass(frozen=True)
class DecodeCost:
    """Keys per layer, KV head and sequence: those `stored` in a cache, and those `read` by the next query, not counting
    the query's own key. Each key has a value. `router_stored`, `router_read`: additional keys of a router, one per
    block."""

    stored: int
    read: int
    router_stored: int = 0
    router_read: int = 0


@dataclass(frozen=True)
class Pattern:
    """Base class of all patterns. Subclasses are frozen dataclasses: equal settings make equal patterns, which share
    cached layouts.

    `align` is the origin of positions: "document" (the document's first token) or "sequence" (the packed sequence's
    first token, which fills tiles better when documents are packed). Only patterns that depend on absolute positions
    have this field; for a pattern of distances alone both are the same.
    """

    is_mask: ClassVar[bool] = True
    """Whether `visible` over the tokens describes the attention completely. False if a layer must first compute the
    keys (summaries) or choose them (a router); such a pattern covers a whole layer, not single KV heads."""

    def __init_subclass__(cls, **keywords: Any) -> None:
        super().__init_subclass__(**keywords)
        if "visible" in vars(cls) and "plain_window" not in vars(cls):  # that of another rule
            cls.plain_window = Pattern.plain_window

    @property
    def anchor(self) -> str:
        """The origin of the positions that `visible` and `candidates` receive: "document" or "sequence"."""
        return getattr(self, "align", "document")

    @property
    def horizon(self) -> int | None:
        """How far back a query sees: every visible key that is not persistent begins fewer than `horizon` tokens before
        the query. None: no limit. A cache drops the keys that are neither within the horizon nor persistent.
        """
        return None

    def persistent(self, key_start: Tensor) -> Tensor:
        """Whether keys that begin at `key_start` may be seen from beyond the `horizon`: booleans of its shape."""
        return torch.full_like(key_start, self.horizon is None, dtype=torch.bool)

    def visible(self, query: Tensor, key_start: Tensor, key_end: Tensor) -> Tensor:
        """Whether `query` may see the key that represents the tokens `[key_start, key_end)`.

        Arguments are integer tensors that broadcast; a token's key is `[i, i + 1)`. Returns a boolean tensor. Use only
        tensor operators (no chained comparisons, no branches on values), so that the same code runs under `torch.vmap`
        and as FlexAttention's `mask_mod`. The layout builder excludes the future.
        """
        raise NotImplementedError

    def candidates(self, query_start: Tensor, query_stop: Tensor, length: int, block: int) -> tuple[Tensor, Tensor]:
        """Key intervals that may hold a key visible to any query in `[query_start, query_stop)`.

        Tensors are int64 of one shape `[...]`; every position is below `length`, and `query_stop - query_start <=
        block`. Returns `(start, stop)`, each `[..., intervals]`: half-open, in any order; they may overlap, be empty
        or reach past either end. They may cover more than the visible keys (a candidate tile without a visible pair is
        dropped) but must cover all of them. The number of intervals depends on the settings, `length` and `block`
        alone, never on tensor values, so that a GPU builds a layout without synchronizing with the host.
        """
        raise NotImplementedError

    @property
    def edges(self) -> tuple[int, ...]:
        """Distances in tokens at which a key becomes visible or hidden; recall tasks test distances around them."""
        return ()

    def decode_cost(self, context: int, group: int = 1) -> DecodeCost:
        """Counts the keys that a cache of `context` tokens stores, and those that the next query reads.

        The cache stores the keys within the horizon and the persistent ones (a key that is both counts twice). The
        query reads the keys that it sees. `group`: query heads per KV head, for patterns in which each query head reads
        its own keys.
        """
        return keys_of_masks([self], context, span=1)

    def plain_window(self, keys: int) -> int | None:
        """The width w if the pattern is "the last w tokens" (`keys`: all earlier tokens), else None. Some libraries
        support this pattern alone, and tiles inside it need no evaluation. A class that defines `visible` anew inherits
        no width."""
        return None


def keys_of_masks(patterns: Sequence[Pattern], context: int, span: int) -> DecodeCost:
    """As Pattern.decode_cost, for one pattern or one per KV head (which share a cache); each key represents `span`
    tokens."""
    horizons = [each.horizon for each in patterns]
    key = torch.arange(context // span) * span
    persistent = torch.stack([each.persistent(key) for each in patterns]).any(0)
    recent = 0 if None in horizons else min((max(horizons) - 1) // span, len(key))
    query = torch.tensor(context)
    seen = torch.stack([each.visible(query, key, key + span).expand(len(key)) for each in patterns]).any(0)
    return DecodeCost(len(key) if None in horizons else recent + int(persistent.sum()), int(seen.sum()))


def require(condition: bool, name: str, value: object, accepted: str) -> None:
    """Raises ValueError with a setting's name, its value, and what is accepted, unless the condition holds."""
    if not condition:
        raise ValueError(f"{name}={value!r}: must be {accepted}")


def require_int(name: str, value: object, minimum: int) -> None:
    """Raises ValueError unless `value` is an int of at least `minimum`."""
    is_int = isinstance(value, int) and not isinstance(value, bool)
    require(is_int and value >= minimum, name, value, f"an integer >= {minimum}")


def require_align(value: object) -> None:
    """Raises ValueError unless `value` is an origin of positions, "document" or "sequence"."""
    require(value in ("document", "sequence"), "align", value, "'document' or 'sequence'")

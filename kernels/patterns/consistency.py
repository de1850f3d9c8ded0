"""Compares the methods of a pattern with one another, on a sample of queries.

The layout builder evaluates `visible` on the candidates alone, and a cache drops the keys that are neither within the
horizon nor persistent. A visible pair that these leave out by mistake would be missing without an error.
"""

import torch

from kernels.patterns.base import Pattern

LENGTH = 32_768
"""Tokens of the document from which the queries are sampled."""
QUERIES = torch.arange(17) * 2039 + 11
"""Positions of the queries, spread over the document and over the places within a tile."""


def check_consistency(pattern: Pattern, block: int) -> None:
    """Raises ValueError with the first visible pair of the sample that `candidates` or `horizon` leaves out.

    Patterns that compute or choose their keys (`is_mask` is False) are not checked. `block`: the size of a tile.
    """
    if pattern.is_mask:
        with torch.device("cpu"):  # a caller that builds a model without memory has the device meta as its default
            _check(pattern, block)


def _check(pattern: Pattern, block: int) -> None:
    query, key = QUERIES[:, None], torch.arange(LENGTH)[None]
    seen = pattern.visible(query, key, key + 1)
    if seen.dtype != torch.bool:
        raise ValueError(f"visible: must return booleans, and returns {str(seen.dtype).removeprefix('torch.')}")
    seen = seen & (key <= query)

    tile = QUERIES // block * block
    start, stop = pattern.candidates(tile, (tile + block).clamp(max=LENGTH), LENGTH, block)
    # A tile that a candidate interval touches is evaluated as a whole. Intervals open at +1 and close at -1.
    first = (start // block * block).clamp(0, LENGTH)
    last = torch.where(stop > start, -(-stop // block) * block, first).clamp(0, LENGTH)
    edges = torch.zeros(len(QUERIES), LENGTH + 1, dtype=torch.int32)
    edges.scatter_add_(1, first, torch.ones_like(first, dtype=torch.int32))
    edges.scatter_add_(1, last.maximum(first), -torch.ones_like(first, dtype=torch.int32))
    _refuse(seen & (edges.cumsum(1)[:, :-1] == 0), "candidates: must cover every visible key, and leave out")

    if pattern.horizon is not None:
        kept = pattern.persistent(key) | (query - key < pattern.horizon)
        _refuse(seen & ~kept, f"horizon={pattern.horizon}: must reach every visible key that is not persistent, not so")


def _refuse(pairs: torch.Tensor, rule: str) -> None:
    """Raises ValueError with the rule and the first of the pairs `[queries, keys]` that break it, if there is one."""
    if pairs.any():
        row, key = pairs.nonzero()[0].tolist()
        raise ValueError(f"{rule} key {key} of query {int(QUERIES[row])} in one document")

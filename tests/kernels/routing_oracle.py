"""The truth about routing, query by query in Python: which blocks are eligible, which are chosen, what is visible."""

import torch
from torch import Tensor

from kernels import document_starts


def window_start(query: int, window: int, block: int) -> int:
    return (query - window + 1) // block * block


def eligible(query: int, documents: list[int], window: int, block: int) -> list[int]:
    """Blocks that end before the query's window and whose last token is of its document."""
    stop = window_start(query, window, block)
    return [
        j
        for j in range(len(documents) // block)
        if (j + 1) * block <= stop and documents[(j + 1) * block - 1] == documents[query]
    ]


def naive_summaries(keys: Tensor, documents: Tensor, block: int) -> Tensor:
    """Means over each block's tokens of its last token's document, one block at a time."""
    blocks = []
    for j in range(keys.shape[2] // block):
        part = slice(j * block, (j + 1) * block)
        rows = [
            keys[b, :, part][:, documents[b, part] == documents[b, (j + 1) * block - 1]].mean(1)
            for b in range(len(keys))
        ]
        blocks.append(torch.stack(rows))
    return torch.stack(blocks, 2) if blocks else keys[:, :, :0]


def naive_choice(
    queries: Tensor, summaries: Tensor, documents: Tensor, top_k: int, window: int, block: int, first_block: bool
) -> Tensor:
    """`Selection.chosen` from all scores at once, sorted in Python by (score, lower index)."""
    batch, selectors, length, _ = queries.shape
    scores = (queries @ summaries.mT).float()
    chosen = torch.full((batch, selectors, length, top_k + first_block), -1, dtype=torch.int32)
    first = document_starts(documents) // block
    for b in range(batch):
        ids = documents[b].tolist()
        for t in range(length):
            candidates = eligible(t, ids, window, block)
            always = [j for j in candidates if first_block and j == int(first[b, t])]
            candidates = [j for j in candidates if j not in always]
            for s in range(selectors):
                line = scores[b, s, t].tolist()
                best = sorted(candidates, key=lambda j: (-line[j], j))[:top_k]
                found = sorted(always + best)
                chosen[b, s, t, : len(found)] = torch.tensor(found, dtype=torch.int32)
    return chosen


def random_choice(
    documents: Tensor, selectors: int, slots: int, window: int, block: int, seed: int = 0, near: float = 0.0
) -> Tensor:
    """A `chosen` of independent random eligible blocks; `near`: the share of queries that choose as their left one."""
    generator = torch.Generator().manual_seed(seed)
    batch, length = documents.shape
    chosen = torch.full((batch, selectors, length, slots), -1, dtype=torch.int32)
    for b in range(batch):
        ids = documents[b].tolist()
        for t in range(length):
            candidates = eligible(t, ids, window, block)
            for s in range(selectors):
                if t and ids[t] == ids[t - 1] and torch.rand((), generator=generator) < near:
                    chosen[b, s, t] = chosen[b, s, t - 1]
                    continue
                order = torch.randperm(len(candidates), generator=generator)[:slots].tolist()
                found = sorted(candidates[i] for i in order)
                chosen[b, s, t, : len(found)] = torch.tensor(found, dtype=torch.int32)
    return chosen


def naive_mask(chosen: Tensor, documents: Tensor, block: int) -> Tensor:
    """Booleans `[batch, selectors, queries, keys]`, pair by pair."""
    key = torch.arange(documents.shape[1])
    mask = ((key // block) == chosen[..., None]).any(3)
    return mask & (documents[:, None, :, None] == documents[:, None, None, :])

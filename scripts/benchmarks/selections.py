"""Selections on which routed attention is measured.

random      every query and selector draws its top_k blocks independently and uniformly from its eligible ones
clustered   RUN consecutive queries share one random score for each block; each query replaces each score by a new one
            with probability EXCHANGED and takes the top_k blocks. So neighbours choose similar blocks, as under
            trained routers
file        `chosen` of a trained run, saved by scripts/save_selection.py
"""

from typing import Any

RUN, EXCHANGED = 64, 0.05


def make(kind: str, batch: int, selectors: int, length: int, block: int, top_k: int, file: str | None = None) -> Any:
    """Returns a kernels.Selection on the GPU. kind: "random", "clustered", or "file"."""
    import torch

    from kernels import Selection

    if kind == "file":
        return load(file, batch, selectors, length, block)
    generator = torch.Generator("cuda").manual_seed(0)
    blocks = length // block
    index = torch.arange(blocks, device="cuda")
    chosen = torch.full((batch, selectors, length, top_k), -1, dtype=torch.int32, device="cuda")
    at_once = max(RUN, (1 << 27) // (batch * selectors * blocks) // RUN * RUN)
    for first in range(0, length, at_once):
        query = torch.arange(first, min(first + at_once, length), device="cuda")
        shape = (batch, selectors, len(query), blocks)
        scores = torch.rand(shape, generator=generator, device="cuda")
        if kind == "clustered":
            runs = scores[:, :, ::RUN].repeat_interleave(RUN, 2)[:, :, : len(query)]
            own = torch.rand(shape, generator=generator, device="cuda") < EXCHANGED
            scores = torch.where(own, scores, runs)
        limit = (query - (block - 1)) // block  # a window of one block
        scores = torch.where(index < limit[:, None], scores, -1.0)
        best, found = scores.topk(min(top_k, blocks), -1)
        found = torch.where(best < 0, blocks, found).sort(-1).values
        chosen[:, :, first : first + len(query), : found.shape[-1]] = torch.where(found == blocks, -1, found).int()
    return Selection.from_chosen(chosen, length, block)


def load(file: str, batch: int, selectors: int, length: int, block: int) -> Any:
    """Returns a saved selection, cut to `length`. Each sequence of the batch has one of its layers, evenly spread or
    repeated, and selectors are repeated."""
    import torch

    from kernels import Selection

    saved = torch.load(file, weights_only=True)
    if saved["block"] != block:
        raise SystemExit(f"error: --selection {file} has block {saved['block']}: must be --block, {block}")
    chosen, document_start = saved["chosen"].cuda(), saved["document_start"].cuda()
    if chosen.shape[2] < length:
        raise SystemExit(f"error: --selection {file} has {chosen.shape[2]} queries: must have {length} or more")
    layers = torch.linspace(0, len(chosen) - 1, min(batch, len(chosen))).round().long().to(chosen.device)
    chosen, document_start = chosen[layers], document_start[layers]
    repeat = lambda x, n, dim: x.repeat_interleave(-(-n // x.shape[dim]), dim).narrow(dim, 0, n)  # noqa: E731
    chosen = repeat(repeat(chosen, batch, 0), selectors, 1)[:, :, :length].contiguous()
    return Selection.from_chosen(chosen, length, block, repeat(document_start, batch, 0)[:, :length].contiguous())

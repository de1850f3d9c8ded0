"""Block-sparse attention: window + global + random blocks (BigBird, Zaheer et al. 2020, made causal)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.patterns.base import Pattern, require_align, require_int


@dataclass(frozen=True)
class BlockSparse(Pattern):
    """Positions are divided into blocks of `block_size`; a query sees whole blocks:

    - the last `window_blocks` blocks, its own included;
    - the first `global_blocks` blocks of the document;
    - `random_blocks` earlier blocks, chosen by a hash of (`seed`, the query's block, the draw): the same ones in every
      run, on every device and at every length. Draws may repeat, or hit blocks of the two other kinds.
    """

    block_size: int
    window_blocks: int
    global_blocks: int
    random_blocks: int
    seed: int = 0
    align: str = "document"

    def __post_init__(self) -> None:
        require_int("block_size", self.block_size, 1)
        require_int("window_blocks", self.window_blocks, 1)
        require_int("global_blocks", self.global_blocks, 0)
        require_int("random_blocks", self.random_blocks, 0)
        require_int("seed", self.seed, 0)
        require_align(self.align)

    @property
    def horizon(self) -> int | None:
        return None if self.random_blocks else self.window_blocks * self.block_size

    def persistent(self, key_start: Tensor) -> Tensor:
        return super().persistent(key_start) | (key_start < self.global_blocks * self.block_size)

    @property
    def edges(self) -> tuple[int, ...]:
        return (self.block_size,)

    def visible(self, query: Tensor, key_start: Tensor, key_end: Tensor) -> Tensor:
        query_block = query // self.block_size
        key_block = key_start // self.block_size
        seen = (query_block - key_block < self.window_blocks) | (key_block < self.global_blocks)
        for draw in range(self.random_blocks):
            seen = seen | (key_block == self._random_block(query_block, draw))
        return seen

    def candidates(self, query_start: Tensor, query_stop: Tensor, length: int, block: int) -> tuple[Tensor, Tensor]:
        first = query_start // self.block_size
        last = (query_stop - 1) // self.block_size
        zero = torch.zeros_like(first)
        starts = [first - (self.window_blocks - 1), zero]
        stops = [last + 1, zero + self.global_blocks]
        touched = (block - 1) // self.block_size + 2  # pattern blocks that `block` consecutive queries may overlap
        for step in range(touched):
            query_block = torch.minimum(first + step, last)
            for draw in range(self.random_blocks):
                chosen = self._random_block(query_block, draw)
                starts.append(chosen)
                stops.append(chosen + 1)
        start = torch.stack(starts, -1) * self.block_size
        stop = torch.stack(stops, -1) * self.block_size
        return start, stop

    def _random_block(self, query_block: Tensor, draw: int) -> Tensor:
        """The `draw`-th random block of `query_block`: uniform over the blocks before it (block 0 for the first)."""
        # Multiplicative hashing with xor-shifts (Steele et al. 2014, "SplitMix"), kept to 31 bits so that int32
        # positions, int64 positions and a compiled kernel give the same number.
        offset = (self.seed * 0x85EBCA6B + draw * 0xC2B2AE35 + 0x27D4EB2F) & 0x7FFFFFFF
        mixed = query_block.long() * 0x9E3779B1 + offset
        for multiplier in (0x7FEB352D, 0x2C1B3C6D):
            mixed = mixed & 0x7FFFFFFF
            mixed = (mixed ^ (mixed >> 15)) * multiplier
        mixed = mixed & 0x7FFFFFFF
        mixed = mixed ^ (mixed >> 16)
        return mixed % query_block.long().clamp(min=1)

"""Samples of several sources by weight.

Weights are a ratio of integers, such as 3:1. Every block of 3 + 1 samples has 3 of the first source and 1 of the
second, in an order that (seed, block) determines. Within a source, samples follow its own endless passes, each a
permutation that (seed, source, pass) determines. So the n-th sample of a run is a function of (seed, weights, n): the
number of samples consumed is enough to resume exactly, and at the end of each block every source has its exact share.
With `at_a_time` n, every draw of a source takes its next n samples, and a block is n times as long.
"""

from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch.utils.data import Dataset

from .collation import Batch, Packed
from .corpus import Split
from .errors import CorpusError
from .packing import SplitSubset, items
from .sampler import ResumableSampler

BLOCKS = 0
"""The first integer of the key of a permutation that orders the sources in a block; the sources' own have 1, 2, ..."""


class MixedSequences(Dataset):
    """The packed sequences of each source of a split, one source after another.

    The documents of a sequence are of one source.

    weights: the ratio in which training draws from the sources, by name.
    packed: packs the documents of one source into sequences.
    tagged: adds `source`, int32 `[sequence_length]`, the number of the source, to each sequence.
    generated: the sequences of the sources that generate them, by name.
    at_a_time: the number of consecutive samples that MixedSampler takes from one source.

    Raises:
        CorpusError: a source has no document in the split.
    """

    def __init__(
        self,
        split: Split,
        weights: Mapping[str, int],
        packed: Callable[[SplitSubset], Dataset],
        tagged: bool,
        generated: Mapping[str, Dataset] | None = None,
        at_a_time: int = 1,
    ):
        self.at_a_time = at_a_time
        self.split = split
        self.weights = weights
        self.tagged = tagged
        source = np.array([name.partition("/")[0] for name in split.names])
        self.parts = []
        for name in weights:
            if name in (generated or {}):
                self.parts.append(generated[name])
                continue
            documents = np.flatnonzero(source == name)
            if not len(documents):
                raise CorpusError(
                    f"data.source.sources: {name}: must have a document of data.minimum_tokens in the"
                    f" {split.folder.name} split"
                )
            self.parts.append(packed(SplitSubset(split, documents)))
        self.starts = np.cumsum([0, *map(len, self.parts)])

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, index: int) -> Batch:
        number, place = self._place(index)
        sequence = self.parts[number][place]
        if self.tagged:
            sequence["source"] = torch.full_like(sequence["document"], number)
        return sequence

    def __getitems__(self, indices: list[int]) -> list[Packed | Batch]:
        if self.tagged:
            return [self[index] for index in indices]
        places = [self._place(index) for index in indices]
        return [sequence for number, place in places for sequence in items(self.parts[number], place)]

    def documents(self, index: int) -> list[int]:
        """Returns the indices in the split of the documents in a sequence."""
        number, place = self._place(index)
        return self.parts[number].documents(place)

    def spread(self, count: int) -> list[int]:
        """Returns the indices of `count` sequences, rounded up to the same number of each source, evenly spread; all of
        a source that has fewer."""
        each = -(-count // len(self.parts))
        sizes = [min(each, len(part)) for part in self.parts]
        return [
            int(start) + index * len(part) // size
            for start, part, size in zip(self.starts, self.parts, sizes, strict=False)
            for index in range(size)
        ]

    def _place(self, index: int) -> tuple[int, int]:
        number = int(np.searchsorted(self.starts, index, side="right")) - 1
        return number, index - int(self.starts[number])


class MixedSampler(ResumableSampler):
    """A ResumableSampler that draws from each source its share by weight.

    In a run whose sequences grow, each phase but the last shuffles its samples across blocks: then the shares are exact
    over a phase, to within a block.
    """

    def __init__(self, sequences: MixedSequences, *arguments, **settings):
        super().__init__(sequences, *arguments, **settings)
        self.starts = sequences.starts
        self.counts = list(sequences.weights.values())
        self.at_a_time = sequences.at_a_time

    def sequence_at(self, read: int) -> int:
        together, within = divmod(read, self.at_a_time)
        block, place = divmod(together, sum(self.counts))
        order = self._order(BLOCKS, sum(self.counts), BLOCKS, block)
        of_block = np.repeat(np.arange(len(self.counts)), self.counts)[order]
        source = int(of_block[place])
        earlier = block * self.counts[source] + int(np.count_nonzero(of_block[:place] == source))
        earlier = earlier * self.at_a_time + within
        start, stop = (int(each) for each in self.starts[source : source + 2])
        of_pass, place = divmod(earlier, stop - start)
        return start + int(self._order(source + 1, stop - start, source + 1, of_pass)[place])

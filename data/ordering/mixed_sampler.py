"""The order of samples of several sources, by weight.

Weights are a ratio of integers, such as 3:1. Every block of 3 + 1 samples has 3 of the first source and 1 of the
second, in an order that (seed, block) determines. Within a source, samples follow its own endless passes, each a
permutation that (seed, source, pass) determines. So the n-th sample of a run is a function of (seed, weights, n): the
number of samples consumed is enough to resume exactly, and at the end of each block every source has its exact share.
With `at_a_time` n, every draw of a source takes its next n samples, and a block is n times as long.
"""

import numpy as np

from ..sequences.mixed_sequences import MixedSequences
from .sampler import ResumableSampler

BLOCKS = 0
"""The key of the permutations that order the sources within a block begins with 0; that of the permutations of the
samples of source i begins with i + 1."""


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

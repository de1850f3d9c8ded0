"""The endless order of training samples. Its whole state is one integer, the number of samples consumed.

Each pass over the data follows the permutation that (seed, pass) determines (permutation.py). So the n-th sample of a
run is a function of (seed, n) alone. Workers, the batch size and interruptions do not change it: a resumed run reads
the samples that the uninterrupted run would have read.

Where the length of the sequences grows during a run, each phase but the last cuts the sequences of the last phase's
length into shorter samples. A pass is a permutation of the long sequences; a phase takes a range of it, and shuffles
the samples into which that range is cut. Every phase begins between two long sequences. So no token of a pass is read
twice or left out, and the last phase reads the sequences that it would have read without earlier phases.

A resumed run under Lightning continues to count its batches: it takes those before the checkpoint as fetched and stops
at the loader's length. So the length is that of the whole run, while iteration begins at the cursor. Without a length,
Lightning would fetch one batch ahead and lose it at a checkpoint.
"""

from bisect import bisect
from collections.abc import Callable, Hashable, Iterator, Sequence, Sized
from itertools import accumulate, islice, pairwise
from typing import NamedTuple

import numpy as np
from torch.utils.data import Sampler

from .permutation import LazyPermutation, permutation


class Phase(NamedTuple):
    """A part of a run with samples of one length.

    start: sequences of the last phase's length that all ranks read before it.
    cuts: the number of samples that such a sequence is cut into.
    """

    start: int
    cuts: int


class ResumableSampler(Sampler[int]):
    """Yields the indices of this rank's samples without end, from `cursor()` on.

    With several phases, the dataset must hold the samples of all of them in their order (packing.SeveralLengths): for
    each phase, every long sequence cut into `cuts` samples.

    sequences: the sequences of the last phase's length; only their number is used.
    length: samples of the whole run on this rank; `len` returns it, and iteration goes on beyond it.
    cursor: returns the number of samples consumed by all ranks; called once, when iteration begins.
    """

    def __init__(
        self,
        sequences: Sized,
        seed: int,
        length: int,
        cursor: Callable[[], int],
        rank: int,
        world_size: int,
        phases: Sequence[Phase] = (Phase(0, 1),),
    ):
        self.count = len(sequences)
        self.seed = seed
        self.length = length
        self.cursor = cursor
        self.rank, self.world_size = rank, world_size
        self.phases = phases
        samples = [(after.start - before.start) * before.cuts for before, after in pairwise(phases)]
        self.first_samples = list(accumulate(samples, initial=0))  # the run's first sample of each phase
        sizes = [self.count * phase.cuts for phase in phases]
        self.first_indices = list(accumulate(sizes[:-1], initial=0))  # where each phase begins in the dataset
        self._orders: dict[Hashable, tuple[tuple[int, ...], np.ndarray | LazyPermutation]] = {}

    def at(self, sample: int) -> int:
        """Returns the index in the dataset of the run's sample number `sample`, counted over all ranks."""
        number = bisect(self.first_samples, sample) - 1
        start, cuts = self.phases[number]
        sequence, cut = divmod(sample - self.first_samples[number], cuts)
        read = start + sequence  # long sequences, over all passes
        of_pass = read // self.count
        if cuts > 1:
            first = max(start, of_pass * self.count)
            stop = min(self.phases[number + 1].start, (of_pass + 1) * self.count)
            order = self._order("samples", (stop - first) * cuts, of_pass, first)
            sequence, cut = divmod(int(order[(read - first) * cuts + cut]), cuts)
            read = first + sequence
        return self.first_indices[number] + self.sequence_at(read) * cuts + cut

    def sequence_at(self, read: int) -> int:
        """Returns the index of the long sequence that is read after `read` others, over all passes."""
        of_pass, place = divmod(read, self.count)
        return int(self._order("sequences", self.count, of_pass)[place])

    def cuts_of(self, index: int) -> int:
        """Returns the number of samples into which each sequence of the last length is cut, in the phase of sample
        `index`."""
        return self.phases[bisect(self.first_indices, index) - 1].cuts

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[int]:
        sample = self.cursor() + self.rank
        while True:
            yield self.at(sample)
            sample += self.world_size

    def _order(self, of: Hashable, size: int, *key: int) -> np.ndarray | LazyPermutation:
        """Returns the permutation of `size` numbers that (seed, key) determines. `of`: what it orders; the latest
        permutation of each is kept."""
        if of not in self._orders or self._orders[of][0] != key:
            self._orders[of] = key, permutation(size, self.seed, *key)
        return self._orders[of][1]


class Batches(Sampler[list[int]]):
    """Batches of a sampler's samples: `batch_size` long sequences, or as many tokens in shorter samples."""

    def __init__(self, sampler: ResumableSampler, batch_size: int):
        self.sampler, self.batch_size = sampler, batch_size

    def __len__(self) -> int:
        return len(self.sampler) // self.batch_size

    def __iter__(self) -> Iterator[list[int]]:
        samples = iter(self.sampler)
        for first in samples:
            yield [first, *islice(samples, self.batch_size * self.sampler.cuts_of(first) - 1)]

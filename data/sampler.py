"""The endless order of training samples. Its whole state is one integer, the number of samples consumed.

Each pass over the data follows the permutation that (seed, pass) determines. So the n-th sample of a run is a function
of (seed, n) alone. Workers, the batch size and interruptions do not change it: a resumed run reads the samples that the
uninterrupted run would have read.

A resumed run under Lightning continues to count its batches: it takes those before the checkpoint as fetched and stops
at the loader's length. So the length is that of the whole run, while iteration begins at the cursor. Without a length,
Lightning would fetch one batch ahead and lose it at a checkpoint.
"""

from collections.abc import Callable, Iterator

import numpy as np
from torch.utils.data import Dataset, DistributedSampler


class ResumableSampler(DistributedSampler):
    """Yields the indices of this rank's samples without end, from `cursor()` on.

    It is a DistributedSampler because Lightning replaces every other sampler if there is more than one process.

    length: samples of the whole run on this rank; `len` returns it, and iteration goes on beyond it.
    cursor: returns the number of samples consumed by all ranks; called once, when iteration begins.
    """

    def __init__(self, dataset: Dataset, seed: int, length: int, cursor: Callable[[], int], rank: int, world_size: int):
        super().__init__(dataset, num_replicas=world_size, rank=rank)
        self.seed = seed
        self.length = length
        self.cursor = cursor

    def at(self, sample: int) -> int:
        """Returns the index in the dataset of the run's sample number `sample`, counted over all ranks."""
        number, place = divmod(sample, len(self.dataset))
        return int(self._permutation(number)[place])

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[int]:
        sample, current = self.cursor() + self.rank, None
        while True:
            number, place = divmod(sample, len(self.dataset))
            if number != current:
                current, permutation = number, self._permutation(number)
            yield int(permutation[place])
            sample += self.num_replicas

    def _permutation(self, number: int) -> np.ndarray:
        """The order of the dataset in pass `number`."""
        return np.random.default_rng((self.seed, number)).permutation(len(self.dataset))

"""An endless stream of sample numbers whose whole state is one integer: how many samples were consumed.

Pass p over the data follows the permutation that (seed, p) gives. So the n-th sample of a run is a pure function of
(seed, n): it knows nothing of workers, of batch size or of when the run was stopped, and a run that goes on at its
cursor reads what it would have read.

Lightning counts batches from 0 within a run, also in a resumed one: there it takes the batches that were consumed
before as fetched, and stops at the loader's length. Therefore the length is that of the *whole* run, and only the
iteration starts at the cursor. Without a length it would fetch one batch ahead and lose it at a checkpoint.
"""

from collections.abc import Callable, Iterator

import numpy as np
from torch.utils.data import Dataset, DistributedSampler


class Stream(DistributedSampler):
    """Sample numbers of this rank, endlessly, from `cursor()` on.

    A DistributedSampler because Lightning replaces every other sampler when there is more than one process.

    length: how many samples the whole run takes on this rank. It is what len() answers, and no limit.
    cursor: returns the samples consumed so far by all ranks; asked once, when iteration begins.
    """

    def __init__(self, dataset: Dataset, seed: int, length: int, cursor: Callable[[], int], rank: int, world_size: int):
        super().__init__(dataset, num_replicas=world_size, rank=rank)
        self.seed = seed
        self.length = length
        self.cursor = cursor

    def at(self, sample: int) -> int:
        """The sample number that is `sample`-th of the run, over all ranks."""
        number, place = divmod(sample, len(self.dataset))
        return int(np.random.default_rng((self.seed, number)).permutation(len(self.dataset))[place])

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[int]:
        size = len(self.dataset)
        sample, current = self.cursor() + self.rank, None
        while True:
            number, place = divmod(sample, size)
            if number != current:
                current, permutation = number, np.random.default_rng((self.seed, number)).permutation(size)
            yield int(permutation[place])
            sample += self.num_replicas

"""The packed sequences of several sources."""

from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch.utils.data import Dataset

from ..collation import Batch, Packed
from ..corpus import Split
from ..errors import CorpusError
from .packing import SplitSubset, items


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
        generated: Mapping[str, Dataset],
        at_a_time: int,
    ):
        self.at_a_time = at_a_time
        self.split = split
        self.weights = weights
        self.tagged = tagged
        source = np.array([name.partition("/")[0] for name in split.names])
        self.parts = []
        for name in weights:
            if name in generated:
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

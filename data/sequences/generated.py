"""Training sequences that a source generates from its documents, such as questions about facts far back.

Each sequence is a function of (seed, split, length, index). A training pass has 2^40 indices, in an order that the seed
determines, so no run reaches its end. Validation sequences use other random numbers and the documents of the validation
split; they are the same for every seed.
"""

from typing import TYPE_CHECKING

import numpy as np
from torch.utils.data import Dataset

from ..collation import Batch
from ..sources import SPLITS, GeneratingSource
from ..tokenizers import Tokenizer

if TYPE_CHECKING:
    from ..corpus import Split


ENDLESS = 1 << 40
"""Sequences of a pass."""


class Generated(Dataset):
    """The sequences that `source` generates from the documents of a split.

    seed: of the training sequences.
    cuts: in a run whose sequences grow, how many sequences of this length have the tokens of one of the last length.
    """

    def __init__(
        self,
        source: GeneratingSource,
        documents: "Split",
        tokenizer: Tokenizer,
        sequence_length: int,
        seed: int,
        cuts: int = 1,
    ):
        self.source = source
        self.documents_of_split = documents
        self.tokenizer = tokenizer
        self.sequence_length = sequence_length
        split = SPLITS.index(documents.folder.name)
        self.stream = (seed if split == 0 else 0, split, sequence_length)
        self.cuts = cuts

    def __len__(self) -> int:
        return ENDLESS * self.cuts

    def __getitem__(self, index: int) -> Batch:
        generator = np.random.default_rng((*self.stream, index))
        return self.source.generate(self.documents_of_split, self.tokenizer, self.sequence_length, generator)

    def documents(self, index: int) -> list[int]:
        """Returns no numbers: a generated sequence belongs to no document."""
        return []

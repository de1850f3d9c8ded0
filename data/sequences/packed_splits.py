"""The sequences of a corpus: the documents of a split, packed, mixed by source, or generated from."""

from collections.abc import Mapping

from torch.utils.data import Dataset

from ..corpus import Corpus, Split
from ..sources import Source
from .generated import Generated
from .mixed_sequences import MixedSequences
from .packing import Contiguous, SplitSubset, pack, weighted


class PackedSplits:
    """Packs each split of a corpus once. The arguments are those of DataModule.

    sequence_length: the last one, in a run whose sequences grow.
    seed: of generated sequences.
    """

    def __init__(
        self,
        corpus: Corpus,
        source: Source,
        packing: str,
        sequence_length: int,
        length_weights: Mapping[int, int],
        document_mask: bool,
        seed: int,
    ):
        self.corpus, self.source = corpus, source
        self.packing, self.sequence_length = packing, sequence_length
        self.length_weights, self.document_mask, self.seed = length_weights, document_mask, seed
        self._packed: dict[tuple[str, int | None, int | None], Dataset] = {}

    def of(self, split: str, seed: int | None = None, cuts: int | None = None) -> Dataset:
        """Returns the sequences of a split.

        seed: of the order of its documents; None for their own order.
        cuts: each sequence is cut into so many samples, as those of an early phase; None cuts none.
        """
        key = split, seed, cuts
        if key not in self._packed:
            self._packed[key] = self._pack(split, seed, cuts)
        return self._packed[key]

    def _pack(self, split: str, seed: int | None, cuts: int | None) -> Dataset:
        tokenizer = self.corpus.tokenizer
        documents, weights = self.corpus.splits[split], self.source.weights
        length = self.sequence_length // (cuts or 1)
        generated = {
            name: Generated(source, documents.texts, tokenizer, length, self.seed, cuts or 1)
            for name, source in self.source.generating.items()
        }

        def packed(documents: Split | SplitSubset) -> Dataset:
            if split == "train" and self.length_weights:
                documents = weighted(documents, self.length_weights)
            if cuts is None:
                return pack(self.packing, documents, length, tokenizer.bos, seed, self.document_mask)
            return Contiguous(documents, length, tokenizer.bos, seed, self.document_mask, cuts)

        if weights is None:
            return next(iter(generated.values()), None) or packed(documents)
        at_a_time = max(1, (self.source.tokens_at_a_time or 0) // self.sequence_length)
        return MixedSequences(documents, weights, packed, split == "validation", generated, at_a_time)

"""The data of a run for Lightning: the corpus, packed sequences, loaders, and the cursor at which a run resumes."""

from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import BatchSampler, DataLoader, Dataset, Sampler, SequentialSampler, Subset

from .collation import NO_TARGET, collate
from .corpus import Corpus
from .errors import CorpusError
from .ordering.mixed_sampler import MixedSampler
from .ordering.sample_order import SampleOrder
from .ordering.sampler import Batches, Phase, ResumableSampler
from .preparation import prepare
from .sequences.generated import ENDLESS
from .sequences.mixed_sequences import MixedSequences
from .sequences.packed_splits import PackedSplits
from .sequences.packing import SeveralLengths, weighted
from .sources import Hub, Source
from .streaming.streamed import ShardStreams
from .streaming.streamed_loader import StreamCursor, StreamedLoader
from .tokenizers import Tokenizer
from .unchanged import check_unchanged
from .units import units_of
from .worker import start_worker


class DataModule(LightningDataModule):
    """Sequences of tokens for training, validation and test. The defaults are in configs/data/*.yaml.

    source, path: a reader of documents, and the path or paths that it reads: `Files(...)` and a folder, `Hub(...)` and
        a dataset's name
    tokenizer: converts text to tokens; after `setup`, the trained one
    packing: `contiguous`, `whole` or `best_fit` (sequences/packing.py)
    document_mask: whether attention and positions end with a document (collation.py)
    length_weights: {tokens: times that a pass of training reads a document of at least so many tokens}; None reads
        each once
    sequence_length: tokens in a sequence
    batch_size: sequences per device and batch
    validation_sequences: the most sequences to validate on, spread evenly over the split; None is all of them
    minimum_tokens: shorter documents are left out
    on_bad_document: `error`, `skip` or `replace`, for documents that cannot be read (data/sources/bad_documents.py)
    workers: processes that load batches, 0 for none; the order of the data does not depend on it
    cache: the folder of prepared corpora
    seed: determines the order of documents and sequences

    A batch is a dict of tensors `[batch, sequence_length]`, with the keys that data/collation.py lists. In a run whose
    sequences grow (`lengths`), the batches of early phases have more sequences, which are shorter; the number of tokens
    in a batch is the same in all phases. The training step must call `advance(batch_size)`, which keeps `cursor` exact
    in every checkpoint. (A count in the loader would include batches that workers prefetched; a count in a callback
    after the batch would come after the checkpoint.)
    """

    def __init__(
        self,
        *,
        source: Source,
        path: str | Sequence[str] | None,
        tokenizer: Tokenizer,
        packing: str,
        document_mask: bool,
        length_weights: Mapping[int, int] | None,
        sequence_length: int,
        batch_size: int,
        validation_sequences: int | None,
        minimum_tokens: int,
        on_bad_document: str,
        workers: int,
        cache: str,
        seed: int,
    ):
        super().__init__()
        source.check_settings(path, on_bad_document)
        if source.generating and validation_sequences is None:
            raise CorpusError("data.validation_sequences=null: must be a number, since generated sequences have no end")
        if source.streaming and packing != "contiguous":
            raise CorpusError(f"data.packing={packing}: must be contiguous with data.source.streaming=true")
        if source.streaming and length_weights:
            raise CorpusError(f"data.length_weights={length_weights}: must be null with data.source.streaming=true")
        self.source = source
        self.path = path
        self.tokenizer = tokenizer
        self.packing = packing
        self.document_mask = document_mask
        self.length_weights = dict(length_weights or {})
        self.sequence_length = sequence_length
        self.batch_size = batch_size
        self.validation_sequences = validation_sequences
        self.minimum_tokens = minimum_tokens
        self.on_bad_document = on_bad_document
        self.workers = workers
        self.cache = Path(cache)
        self.seed = seed
        self.cursor = 0  # training samples consumed so far on all devices
        self.ranks_per_sequence = 1  # number of consecutive ranks that take the same sequences
        self.ranks = 1  # ranks that take different sequences; the default number of streams is a multiple of it
        # (first optimizer step, sequence length) of each phase of a run whose sequences grow; the last one's length is
        # `sequence_length`, of which the others must be divisors
        self.lengths: Sequence[tuple[int, int]] = ()
        self.train_batches: int | None = None  # the length of train_dataloader() without a trainer
        self.corpus: Corpus | None = None
        self.streams: StreamCursor | None = None  # of a source that is streamed; `setup` makes it
        self._resumed_order: int | None = None
        self._packed: PackedSplits | None = None

    # The corpus

    def prepare_data(self) -> None:
        """Prepares the corpus if the cache does not have it. Lightning calls this in one process per machine."""
        if self.corpus is None:
            self.corpus = prepare(
                self.source, self.path, self.tokenizer, self.minimum_tokens, self.cache, self.on_bad_document
            )

    def setup(self, stage: str | None = None) -> None:
        """Opens the corpus.

        Raises:
            CorpusError: the training split does not fill one sequence, or a source of a mixture has no document in a
                split.
        """
        self.prepare_data()
        self.tokenizer = self.corpus.tokenizer
        if isinstance(self.source, Hub) and self.source.streaming:
            if self.streams is None:
                keys = ("seed", "on_bad_document", "minimum_tokens", "sequence_length", "document_mask")
                settings = {key: getattr(self, key) for key in keys}
                self.streams = StreamCursor(
                    ShardStreams.of(self.source, self.path, self.corpus, self.ranks, **settings)
                )
            return
        tokens = self.corpus.splits["train"].total_tokens
        if tokens <= self.sequence_length:
            raise CorpusError(
                f"data.sequence_length={self.sequence_length}: must be at most {tokens - 1}, since the training split"
                f" has {tokens} tokens"
            )
        for split in self.corpus.splits if self.source.weights else ():
            self._sequences(split, self.seed if split == "train" else None)  # those that the loaders read
        for source in self.source.generating.values():
            for length in sorted({length for _, length in self.lengths} | {self.sequence_length}):
                source.check_length(self.corpus.splits["train"].texts, self.tokenizer, length)

    def check_unchanged(self, state: Mapping[str, Any], run: str) -> None:
        """Raises CorpusError unless the corpus is the one of `run`, whose checkpoint has `state` (unchanged.py)."""
        shards = self.streams.shards if self.streams else None
        check_unchanged(run, state, self.path, self.corpus.contents, shards, lambda: self._order().number)

    @property
    def vocabulary(self) -> int:
        return self.tokenizer.vocabulary

    @property
    def tokens_per_pass(self) -> int | None:
        """The tokens of the training documents, each as often as a pass reads it; None if there is no such pass: if
        they are streamed, or mixed with other sources, or if sequences are generated."""
        if self.streams or self.source_names or self.source.generating:
            return None
        return self._weighted_tokens

    @property
    def _weighted_tokens(self) -> int:
        train = self.corpus.splits["train"]
        return weighted(train, self.length_weights).total_tokens if self.length_weights else train.total_tokens

    def describe_training(self) -> str:
        """Returns the size of the training data, in words."""
        if self.streams:
            return self.streams.describe()
        weighted = f", {self._weighted_tokens:,} a pass" if self.length_weights else ""
        tokens = f"{self.corpus.splits['train'].total_tokens:,} tokens"
        if self.text_sources == []:
            return f"endless generated sequences to train on, with text of its {tokens}"
        beside = " beside generated sequences" if self.text_sources else ""
        return f"{tokens} to train on{weighted}{beside}"

    @property
    def source_names(self) -> list[str]:
        """The names of the sources of a mixture, by the numbers in `source`; empty otherwise."""
        return list(self.source.weights or ())

    @property
    def text_sources(self) -> list[str] | None:
        """The names of a mixture's sources that do not generate their sequences; empty if all sequences are generated.
        None if no source generates sequences."""
        generating = self.source.generating
        return [name for name in self.source_names if name not in generating] if generating else None

    @property
    def units(self) -> dict[str, str]:
        """The units of losses (units.py)."""
        return units_of(self.tokenizer, self.source)

    @property
    def token_bytes(self) -> torch.Tensor:
        """int64 `[vocabulary]`: bytes of text that a token stands for, 0 for bos; all 0 where losses are not given per
        byte. Of a lossy tokenizer float64: the bytes of the original text for each token, on average over the training
        documents."""
        exact = torch.from_numpy(self.tokenizer.token_bytes)
        if not self.tokenizer.per_byte:
            return torch.zeros_like(exact)
        if not self.tokenizer.lossy:
            return exact
        train = self.corpus.splits["train"]
        mean = train.total_bytes / (train.total_tokens - len(train))
        return torch.full(exact.shape, mean, dtype=torch.float64).index_fill(0, torch.tensor(self.tokenizer.bos), 0.0)

    # Loaders

    def train_dataloader(self) -> "DataLoader | StreamedLoader":
        """Returns an endless loader from the cursor on. Its length is that of the whole run (ordering/sampler.py)."""
        if self._resumed_order is not None and self._resumed_order != (order := self._order()).number:
            raise order.refusal(self.cursor)
        if self.streams:
            if self.trainer and self.trainer.max_steps < 1:
                raise CorpusError("max_epochs: must be left out with data.source.streaming=true, which needs max_steps")
            rank, ranks = self._rank()
            sizes = self.batch_size, self.workers, self._length_in_batches(ENDLESS, ranks)
            return StreamedLoader(self.streams, lambda: self.cursor, rank, ranks, *sizes, self.seed)
        sampler = self._sampler()
        return self._loader(self._samples(), Batches(sampler, self.batch_size))

    def val_dataloader(self) -> DataLoader:
        """Returns a loader of the validation split in order, or of `validation_sequences` evenly spread over it.

        For a mixture, each source gives equally many sequences, and a batch has the tensor `source`, the number of each
        sequence's source (sequences/mixed_sequences.py).
        """
        dataset = self._sequences("validation")
        if self.validation_sequences is not None and self.validation_sequences < len(dataset):
            count = self.validation_sequences
            mixed = isinstance(dataset, MixedSequences)
            spread = dataset.spread(count) if mixed else [index * len(dataset) // count for index in range(count)]
            dataset = Subset(dataset, spread)
        return self._loader_in_order(dataset)

    def test_dataloader(self) -> DataLoader:
        """Returns a loader of the whole test split in order."""
        dataset = self._sequences("test")
        return self._loader_in_order(dataset)

    def sample(self, sequences: int, sequence_length: int | None = None) -> dict[str, torch.Tensor]:
        """Returns a batch of at most `sequences` random training sequences, the same ones for the same seed.

        It does not change the cursor or the state of any random number generator.

        sequence_length: that of a phase; by default the last one's.
        """
        cuts = self.sequence_length // (sequence_length or self.sequence_length)
        dataset = self._sequences("train", self.seed, cuts if cuts > 1 else None)
        chosen = np.random.default_rng(self.seed).choice(len(dataset), min(sequences, len(dataset)), replace=False)
        return torch.utils.data.default_collate([dataset[int(index)] for index in sorted(chosen)])

    def document_names(self, first: int, last: int) -> list[str]:
        """Returns the names of the documents in the run's training samples `first` <= n < `last`, in order."""
        if self.streams:
            return self.streams.documents(first, last)
        dataset, sampler = self._samples(), self._sampler()
        documents = (each for sample in range(first, last) for each in dataset.documents(sampler.at(sample)))
        names = self.corpus.splits["train"].names
        return [names[document] for document in dict.fromkeys(documents)]

    def _sequences(self, split: str, seed: int | None = None, cuts: int | None = None) -> Dataset:
        """Returns the sequences of a split; with `cuts`, the samples of a phase, into which each sequence is cut."""
        if self._packed is None:
            shared = self.packing, self.sequence_length, self.length_weights, self.document_mask, self.seed
            self._packed = PackedSplits(self.corpus, self.source, *shared)
        return self._packed.of(split, seed, cuts)

    def _samples(self) -> SeveralLengths:
        """The training samples of all lengths, in the order of the phases."""
        cuts = [phase.cuts for phase in self._phases()]
        lengths = [None] if cuts == [1] else cuts
        return SeveralLengths([self._sequences("train", self.seed, each) for each in lengths])

    def _phases(self) -> list[Phase]:
        """The phases by the length of their sequences."""
        accumulated = self.trainer.accumulate_grad_batches if self.trainer else 1
        sequences = self.batch_size * accumulated * self._rank()[1]  # of an optimizer step on all ranks
        phases = [Phase(step * sequences, self.sequence_length // length) for step, length in self.lengths]
        same_length = groupby(phases, key=lambda phase: phase.cuts)
        return [next(group) for _, group in same_length] or [Phase(0, 1)]

    def _sampler(self) -> ResumableSampler:
        """The sampler of this rank's training samples, from the cursor on."""
        sequences, (rank, world_size) = self._sequences("train", seed=self.seed), self._rank()
        length = self._length_in_batches(len(sequences), world_size) * self.batch_size
        kind = ResumableSampler if self.source.weights is None else MixedSampler
        return kind(sequences, self.seed, length, lambda: self.cursor, rank, world_size, self._phases())

    def _loader_in_order(self, dataset: Dataset) -> DataLoader:
        return self._loader(dataset, BatchSampler(SequentialSampler(dataset), self.batch_size, drop_last=False))

    def _loader(self, dataset: Dataset, batches: Sampler[list[int]]) -> DataLoader:
        return DataLoader(
            dataset,
            batch_sampler=batches,
            collate_fn=collate,
            num_workers=self.workers,
            worker_init_fn=start_worker,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator().manual_seed(self.seed),  # the default one is the model's
        )

    def _length_in_batches(self, sequences: int, world_size: int) -> int:
        """The batches of a run on this rank. sequences: those of a pass."""
        one_pass = max(1, sequences // (self.batch_size * world_size))
        if self.trainer is None:
            return self.train_batches or one_pass
        accumulated = self.trainer.accumulate_grad_batches
        if self.trainer.max_steps > 0:
            return self.trainer.max_steps * accumulated
        return -(-one_pass // accumulated) * accumulated  # max_epochs: about one pass, in whole optimizer steps

    def _rank(self) -> tuple[int, int]:
        """Returns (this process's share of the training samples, the number of shares)."""
        if self.trainer is None:
            return 0, 1
        return self.trainer.global_rank // self.ranks_per_sequence, self.trainer.world_size // self.ranks_per_sequence

    # The cursor

    def advance(self, samples: int) -> None:
        """Counts the samples of a batch as consumed. The training step calls it on every device."""
        if self.streams:
            self.streams.advance(self.cursor)
        self.cursor += samples * self._rank()[1]

    def on_before_batch_transfer(self, batch: dict[str, Any], dataloader_idx: int) -> dict[str, Any]:
        """Lightning calls it with the batch that is trained on next. Adds `scored`, the number of its targets."""
        if self.streams:
            self.streams.take(batch)
        return batch | {"scored": int((batch["targets"] != NO_TARGET).sum())}

    def teardown(self, stage: str) -> None:
        if self.streams and stage == "fit":
            self.streams.log_left_out()

    def state_dict(self) -> dict[str, Any]:
        state = {"cursor": self.cursor, "stream": self._order().number, "contents": self.corpus.contents}
        return state | (self.streams.state(self.trainer.world_size if self.trainer else 1) if self.streams else {})

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self.streams:
            self.streams.load_state(state, any_number=self.source.streams is None)
        self.cursor = state["cursor"]
        self._resumed_order = state["stream"]

    def _order(self) -> SampleOrder:
        return SampleOrder(
            content=self.corpus.splits["train"].metadata.content,
            packing=self.packing,
            sequence_length=self.sequence_length,
            seed=self.seed,
            document_mask=self.document_mask,
            length_weights=self.length_weights,
            lengths=self.lengths,
            weights=self.source.weights,
            tokens_at_a_time=self.source.tokens_at_a_time,
            streams=self.streams and self.streams.streams.streams,
            samples=None if self.streams else max(map(len, self._samples().datasets)),
            generating={name: source.settings for name, source in self.source.generating.items()},
        )

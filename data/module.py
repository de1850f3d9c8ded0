"""The data of a run, for Lightning: corpus -> packed sequences -> loaders, and the cursor that makes resume exact."""

import hashlib
import logging
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader, Dataset, SequentialSampler, Subset

from .corpus import Corpus
from .errors import CorpusError
from .packing import pack
from .preparation import prepare
from .sources import Source
from .stream import Stream
from .tokenizers import Tokenizer

log = logging.getLogger(__name__)


class DataModule(LightningDataModule):
    """Sequences of tokens for training, validation and test. The defaults are in configs/data/*.yaml.

    source, path: how to read documents, and what: `Files(...)` and a folder, `Hub(...)` and a dataset's name
    tokenizer: what turns text into tokens
    packing: `contiguous` or `whole` (data/packing.py)
    sequence_length: tokens in a sequence
    batch_size: sequences per device and batch
    validation_sequences: at most so many, spread evenly over the validation split; null is all of it
    minimum_tokens: shorter documents are left out
    workers: processes that load batches, 0 for none; the order of the data does not depend on it
    cache: where prepared corpora are kept
    seed: of the order of documents and sequences

    A batch is {"tokens": int64, "targets": int64, "document": int32, "position": int32}, each [batch, sequence_length].
    The training step must call `advance(batch_size)`: then `cursor`, in every checkpoint, is exact. (A loader that
    counted what it hands out would be ahead by what workers prefetched; a callback after the batch would be behind.)
    """

    def __init__(
        self,
        *,
        source: Source,
        path: str | None,
        tokenizer: Tokenizer,
        packing: str,
        sequence_length: int,
        batch_size: int,
        validation_sequences: int | None,
        minimum_tokens: int,
        workers: int,
        cache: str,
        seed: int,
    ):
        super().__init__()
        source.check(path)
        self.source = source
        self.path = path
        self.tokenizer = tokenizer  # after setup(): the trained one
        self.packing = packing
        self.sequence_length = sequence_length
        self.batch_size = batch_size
        self.validation_sequences = validation_sequences
        self.minimum_tokens = minimum_tokens
        self.workers = workers
        self.cache = Path(cache)
        self.seed = seed
        self.cursor = 0  # training samples consumed so far, on all devices
        self.train_batches: int | None = None  # the length of train_dataloader() where no trainer says it
        self.corpus: Corpus | None = None
        self._resumed_stream: int | None = None

    # The corpus

    def prepare_data(self) -> None:
        """Prepare the corpus where it is not in the cache yet (Lightning: on one process a machine)."""
        if self.corpus is None:
            self.corpus = prepare(self.source, self.path, self.tokenizer, self.minimum_tokens, self.cache)

    def setup(self, stage: str | None = None) -> None:
        """Open the corpus. Raises CorpusError where the training split does not fill one sequence."""
        self.prepare_data()
        self.tokenizer = self.corpus.tokenizer
        tokens = self.corpus.splits["train"].total_tokens
        if tokens <= self.sequence_length:
            raise CorpusError(
                f"data.sequence_length={self.sequence_length}: must be at most {tokens - 1}, since the training split"
                f" has {tokens} tokens"
            )

    def check_unchanged(self, state: Mapping[str, Any], run: str) -> None:
        """Raises CorpusError unless the corpus is the one that `run` was trained on.

        state: what its checkpoint holds of the data module (`state_dict`). Older checkpoints hold no `contents`; of
        their corpus the training split alone is checked, by `stream`, and a warning names what is not.
        """
        key = f"data.path={'null' if self.path is None else self.path}"
        if "contents" in state:
            stored, found = state["contents"], self.corpus.contents
            changed = [name for name in stored if found.get(name) != stored[name]]
            if changed:
                old, new = (contents.get(changed[0], "none")[:12] for contents in (stored, found))
                raise CorpusError(
                    f"{key}: must hold the documents that {run} was trained with; its {' and '.join(changed)} split"
                    f" changed (fingerprint of {changed[0]}: {old} then, {new} now)"
                )
        elif "stream" in state:
            if state["stream"] != self._stream_number():
                raise CorpusError(
                    f"{key}: must hold the documents that {run} was trained with; its train split, or the tokenizer"
                    " that was learned from it, changed"
                )
            log.warning(f"{run} stores no fingerprint of its validation and test split: taken as they are now")
        else:
            log.warning(f"{run} stores no fingerprint of its corpus: {key} is taken as it is now")

    @property
    def vocabulary(self) -> int:
        return self.tokenizer.vocabulary

    @property
    def token_bytes(self) -> torch.Tensor:
        """int64 [vocabulary]: bytes of text that a token stands for, 0 for bos."""
        return torch.from_numpy(self.tokenizer.token_bytes)

    # Loaders

    def train_dataloader(self) -> DataLoader:
        """An endless stream of batches from the cursor on. Its length is that of the whole run (see data/stream.py)."""
        if self._resumed_stream not in (None, self._stream_number()):
            raise CorpusError(
                f"data.packing={self.packing}, data.sequence_length={self.sequence_length}, data.seed={self.seed}: must"
                " be those of the checkpoint, as must the corpus and the tokenizer, because the checkpoint counts the"
                f" samples that it consumed ({self.cursor}) in their order; or start from its weights with init_from"
            )
        dataset = self._sequences("train", seed=self.seed)
        rank, world_size = self._rank()
        length = self._length_in_batches(dataset, world_size) * self.batch_size
        return self._loader(dataset, Stream(dataset, self.seed, length, lambda: self.cursor, rank, world_size))

    def val_dataloader(self) -> DataLoader:
        """The validation split in order, or `validation_sequences` of it, evenly spread."""
        dataset = self._sequences("validation")
        if self.validation_sequences is not None and self.validation_sequences < len(dataset):
            count = self.validation_sequences
            dataset = Subset(dataset, [index * len(dataset) // count for index in range(count)])
        return self._loader(dataset, SequentialSampler(dataset))

    def test_dataloader(self) -> DataLoader:
        """The whole test split in order."""
        dataset = self._sequences("test")
        return self._loader(dataset, SequentialSampler(dataset))

    def sample(self, sequences: int) -> dict[str, torch.Tensor]:
        """A batch of at most so many training sequences, the same ones for one seed: what batches are like. Neither the
        cursor nor any generator of random numbers moves."""
        dataset = self._sequences("train", seed=self.seed)
        chosen = np.random.default_rng(self.seed).choice(len(dataset), min(sequences, len(dataset)), replace=False)
        return torch.utils.data.default_collate([dataset[int(index)] for index in sorted(chosen)])

    def document_names(self, first: int, last: int) -> list[str]:
        """Names of the documents in the training samples `first` <= n < `last` of the run (see `cursor`), in order."""
        dataset = self._sequences("train", seed=self.seed)
        stream = Stream(dataset, self.seed, 0, lambda: 0, 0, 1)
        documents = (each for sample in range(first, last) for each in dataset.documents(stream.at(sample)))
        return [dataset.split.names[document] for document in dict.fromkeys(documents)]

    def _sequences(self, split: str, seed: int | None = None) -> Dataset:
        return pack(self.packing, self.corpus.splits[split], self.sequence_length, self.tokenizer.bos, seed)

    def _loader(self, dataset: Dataset, sampler: torch.utils.data.Sampler) -> DataLoader:
        return DataLoader(
            dataset,
            batch_size=self.batch_size,
            sampler=sampler,
            num_workers=self.workers,
            worker_init_fn=_outlive_sigterm,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator().manual_seed(self.seed),  # else it draws from the one that the model uses
        )

    def _length_in_batches(self, dataset: Dataset, world_size: int) -> int:
        one_pass = max(1, len(dataset) // (self.batch_size * world_size))
        if self.trainer is None:
            return self.train_batches or one_pass
        accumulated = self.trainer.accumulate_grad_batches
        if self.trainer.max_steps > 0:
            return self.trainer.max_steps * accumulated
        return -(-one_pass // accumulated) * accumulated  # max_epochs: whole optimizer steps, about a pass an epoch

    def _rank(self) -> tuple[int, int]:
        return (0, 1) if self.trainer is None else (self.trainer.global_rank, self.trainer.world_size)

    # The cursor

    def advance(self, samples: int) -> None:
        """Count samples of a batch as consumed; called by the training step, on every device alike."""
        self.cursor += samples * self._rank()[1]

    def state_dict(self) -> dict[str, Any]:
        return {"cursor": self.cursor, "stream": self._stream_number(), "contents": self.corpus.contents}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.cursor = state["cursor"]
        self._resumed_stream = state["stream"]

    def _stream_number(self) -> int:
        """A number that tells streams apart: of the training tokens and of what orders and cuts them."""
        content = self.corpus.splits["train"].metadata.content
        settings = f"{content} {self.packing} {self.sequence_length} {self.seed}"
        return int(hashlib.sha256(settings.encode()).hexdigest()[:15], 16)


def _outlive_sigterm(worker: int) -> None:
    """A cluster sends SIGTERM to every process of a job. A worker that obeyed would leave the run no batch to finish
    its step with, before it saves; workers end with the process that started them."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)

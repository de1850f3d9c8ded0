"""Batches of streamed sequences (streamed.py), and the positions up to which a run has trained on them.

Each stream is read by one worker. Of w workers, a worker yields every w-th sample of this rank, and its samples always
come from the same streams. The training process takes the samples from the workers in turn and joins them into batches.

Workers read ahead of the training. So a batch carries the positions of its sequences, and a checkpoint stores those of
the last batch that was trained on.
"""

import logging
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import count, islice
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from ..collation import expand
from ..errors import CorpusError
from ..sources.bad_documents import EXAMPLES
from ..worker import start_worker
from .streamed import Position, ShardStreams, Streamed

log = logging.getLogger(__name__)

PLACES = "places"
"""The key of a batch under which `StreamCursor` finds the places of its sequences."""

REMEMBERED = 4096  # sequences whose documents can be named


class StreamCursor:
    """The position of each stream after the sequences that the run has trained on."""

    def __init__(self, streams: ShardStreams):
        self.streams = streams
        self.positions = [Position()] * streams.streams
        self.resumed = False  # then the number of streams is that of the checkpoint
        self._taken: list[Streamed] = []  # of the batch that is trained on next
        self._trained: deque[tuple[int, Streamed]] = deque(maxlen=REMEMBERED)

    @property
    def shards(self) -> list[list[Any]]:
        """Plain values that identify the files: (name, size, hash) of each."""
        return [shard.identity for shard in self.streams.shards]

    def take(self, batch: dict[str, Any]) -> None:
        """Removes the places of the sequences from a batch, which is trained on next."""
        self._taken = batch.pop(PLACES, self._taken)

    def advance(self, sample: int) -> None:
        """Counts the sequences of the batch that was taken last as trained on. `sample`: the run's number of samples
        before it."""
        for each in self._taken:
            self.positions[each.stream] = each.stop
            self._trained.append((sample, each))
        self._taken = []

    def documents(self, first: int, last: int) -> list[str]:
        """Returns the names of the first and the last document of each recent sequence of this rank, in batches that
        begin with a sample `first` <= n < `last` of the run."""
        recent = (each for sample, each in self._trained if first <= sample < last)
        return [self.streams.describe(each.stream, each.start, each.stop) for each in recent]

    def state(self, ranks: int) -> dict[str, Any]:
        """Returns plain values: the positions over all ranks, and the shards."""
        if ranks > 1 and dist.is_initialized():
            gathered: list[list[Position]] = [[]] * dist.get_world_size()
            dist.all_gather_object(gathered, self.positions)
            # One rank has moved the position of a stream, and on all others it is an earlier one.
            self.positions = [max(each) for each in zip(*gathered, strict=True)]
        return {"positions": [list(position) for position in self.positions], "shards": self.shards}

    def load_state(self, state: dict[str, Any], any_number: bool) -> None:
        """Takes over the positions. A checkpoint that has none, or of other streams, is refused by its order.

        any_number: the number of streams becomes that of the checkpoint; it may have begun with other ranks.
        """
        self.positions = [Position(*position) for position in state.get("positions", self.positions)]
        self.resumed = True
        if any_number:
            self.streams = replace(self.streams, streams=len(self.positions))

    def describe(self) -> str:
        """Returns the number and the size of the files that are read, in words."""
        size = sum(shard.size for shard in self.streams.shards)
        return f"{len(self.streams.shards):,} files of {size:,} bytes to train on"

    def log_left_out(self) -> None:
        """Logs how many documents the streams have left out, if there is any. The numbers of other ranks are those
        of the last call of `state`."""
        short, held_out, unreadable = (sum(column) for column in list(zip(*self.positions, strict=True))[4:])
        if short or held_out or unreadable:
            log.info(
                f"documents left out of training: {unreadable:,} that cannot be read, {short:,} too short,"
                f" {held_out:,} held-out ones and their copies"
            )


class _Samples(IterableDataset):
    """The samples of a rank without end: of each `step` samples of the run, the one that sample `first` begins.

    They are divided among workers, whose number is a divisor of the rank's number of streams.
    """

    def __init__(self, streams: ShardStreams, positions: Sequence[Position], first: int, step: int):
        self.streams, self.positions, self.first, self.step = streams, positions, first, step

    def __iter__(self) -> Iterator[Streamed | CorpusError]:
        worker = get_worker_info()
        number, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        opened: dict[int, Iterator[Streamed]] = {}
        for sample in count(self.first + number * self.step, workers * self.step):
            stream = sample % self.streams.streams
            if stream not in opened:
                opened[stream] = self.streams.sequences(stream, self.positions[stream])
            try:
                yield next(opened[stream])
            except CorpusError as error:  # a DataLoader would raise it with the worker's traceback as its message
                yield error
                return


class StreamedLoader:
    """Endless batches of `batch_size` sequences of this rank, from the cursor on.

    consumed: returns the number of samples that all ranks have consumed; called when iteration begins.
    length: batches of the whole run; `len` returns it, and iteration goes on beyond it (../ordering/sampler.py).
    """

    def __init__(
        self,
        cursor: StreamCursor,
        consumed: Callable[[], int],
        rank: int,
        ranks: int,
        batch_size: int,
        workers: int,
        length: int,
        seed: int,
    ):
        streams = cursor.streams.streams
        if streams % ranks:
            divisors = ", ".join(str(each) for each in range(1, streams + 1) if streams % each == 0)
            kept = f"; a resumed run keeps it, and goes on with one of {divisors} ranks" if cursor.resumed else ""
            raise CorpusError(
                f"data.source.streams={streams}: must be a multiple of {ranks}, the number of ranks{kept}"
            )
        own = streams // ranks
        log.info(f"{streams} files are read at the same time")
        self.workers = max((each for each in range(1, workers + 1) if own % each == 0), default=0)
        if self.workers < workers:
            log.info(f"data.workers={workers}: {self.workers} read the {own} streams of a rank, which they must divide")
        self.cursor, self.consumed = cursor, consumed
        self.rank, self.ranks = rank, ranks
        self.batch_size, self.length, self.seed = batch_size, length, seed

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[dict[str, Any]]:
        positions = list(self.cursor.positions)
        loader = DataLoader(
            _Samples(self.cursor.streams, positions, self.consumed() + self.rank, self.ranks),
            batch_size=None,
            collate_fn=_uncollated,
            num_workers=self.workers,
            worker_init_fn=start_worker,
            prefetch_factor=max(2, 2 * self.batch_size // self.workers) if self.workers else None,
            generator=torch.Generator().manual_seed(self.seed),  # the default one is the model's
        )
        return self._batches(iter(loader))

    def _batches(self, samples: Iterator[Streamed | CorpusError]) -> Iterator[dict[str, Any]]:
        skipped = 0
        try:
            while True:
                sequences = []
                for sample in islice(samples, self.batch_size):
                    if isinstance(sample, CorpusError):
                        raise sample
                    sequences.append(sample)
                    for place in sample.skipped:
                        skipped += 1
                        if skipped <= EXAMPLES:
                            log.warning(f"a document cannot be read and is skipped: {place}")
                batch = expand([each.packed for each in sequences])
                if torch.cuda.is_available():
                    batch = {name: tensor.pin_memory() for name, tensor in batch.items()}
                yield batch | {PLACES: [each._replace(packed=None) for each in sequences]}
        finally:
            del samples  # ends the workers, also if a traceback keeps this frame: at exit, Python would wait for them


def _uncollated(sample: Streamed | CorpusError) -> Streamed | CorpusError:
    return sample

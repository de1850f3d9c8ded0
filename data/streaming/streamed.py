"""Training sequences from documents that are read in their files: rows of shards -> tokens -> sequences.

Several streams read at the same time. In each pass the shards are in an order that (seed, pass) determines; of n
streams, stream s reads each n-th shard of it, from number s on, document by document. A stream puts its documents end
to end and cuts every `sequence_length` tokens, as ../sequences/packing.py does. Sample k of a run is the next sequence
of stream k modulo n. So the order of a run depends on its seed and on n, and on nothing that reads ahead.

The state of a stream is the place of the token at which its next sequence begins (`Position`). A resumed run opens that
shard at the row of the document and goes on within it.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import NamedTuple

import numpy as np

from ..collation import Packed
from ..corpus import Corpus
from ..errors import CorpusError
from ..ordering.permutation import permutation
from ..preparation.corpus_writer import SHORTEST
from ..preparation.encoding import BESIDE_TEXT, GROUP
from ..sources import Hub
from ..sources.bad_documents import BadDocuments
from ..sources.file_rows import texts_of
from ..sources.hub_shards import ShardFile, read_shard
from ..sources.splits import digest_of
from ..tokenizers import Tokenizer


class Position(NamedTuple):
    """A token of a stream: the pass over the shards, the number of the shard among the stream's own of this pass, the
    row of the document in the shard, and the token in the document, bos included.

    short, held_out, unreadable: documents that the stream has left out before it: because they are shorter than
        `shortest`, are copies of held-out documents, or cannot be read.
    """

    of_pass: int = 0
    shard: int = 0
    row: int = 0
    token: int = 0
    short: int = 0
    held_out: int = 0
    unreadable: int = 0


class Streamed(NamedTuple):
    """A sequence of a stream, from the token `start` to the token before `stop`. `skipped`: the places of
    documents that were skipped since the stream's previous sequence, if they are among its first EXAMPLES ones."""

    stream: int
    packed: Packed
    start: Position
    stop: Position
    skipped: list[str]


@dataclass
class ShardStreams:
    """The sequences of all streams. A pickled copy is small.

    path: of the dataset, for errors. on_bad_document: `error` or `skip`. shortest: documents with fewer tokens, bos
        included, are left out. held_out: `digest_of` of the documents that no stream reads, and their `sizes` in
        characters.
    """

    shards: Sequence[ShardFile]
    streams: int
    seed: int
    path: str
    text_column: str
    on_bad_document: str
    tokenizer: Tokenizer
    shortest: int
    held_out: frozenset[bytes]
    sizes: frozenset[int]
    sequence_length: int
    document_mask: bool
    dtype: str = field(init=False)

    @classmethod
    def of(
        cls,
        source: Hub,
        path: str,
        corpus: Corpus,
        ranks: int,
        *,
        seed: int,
        on_bad_document: str,
        minimum_tokens: int,
        sequence_length: int,
        document_mask: bool,
    ) -> "ShardStreams":
        """Returns the streams of a dataset, from which the documents of validation and test are left out.

        corpus: that of the same settings, which has these documents and the tokenizer.
        ranks: those that train on different sequences.
        """
        texts = [text for split in ("validation", "test") for text in texts_of(corpus.splits[split].documents)]
        return cls(
            shards=source.shards(path)["train"],
            streams=source.number_of_streams(path, ranks),
            seed=seed,
            path=path,
            text_column=source.text_column,
            on_bad_document=on_bad_document,
            tokenizer=corpus.tokenizer,
            shortest=max(minimum_tokens, SHORTEST),
            held_out=frozenset(map(digest_of, texts)),
            sizes=frozenset(map(len, texts)),
            sequence_length=sequence_length,
            document_mask=document_mask,
        )

    def __post_init__(self):
        self.dtype = "uint16" if self.tokenizer.vocabulary <= 1 << 16 else "uint32"

    def shards_of(self, stream: int, of_pass: int) -> list[ShardFile]:
        """Returns the shards that a stream reads in a pass, in order."""
        order = permutation(len(self.shards), self.seed, of_pass)
        return [self.shards[int(order[number])] for number in range(stream, len(self.shards), self.streams)]

    def describe(self, stream: int, start: Position, stop: Position) -> str:
        """Returns the names of the first and the last document of a sequence."""
        first, last = (f"{self.shards_of(stream, each.of_pass)[each.shard].name}:{each.row}" for each in (start, stop))
        return first if first == last else f"{first} to {last}"

    def sequences(self, stream: int, position: Position) -> Iterator[Streamed]:
        """Yields the sequences of a stream from a position on, without end.

        Raises:
            CorpusError: a document or a file cannot be read, no shard has a document, or the document at `position` is
                another one.
        """
        bad = BadDocuments(self.on_bad_document, self.path)
        documents = self._documents(stream, position, bad)
        pending = deque([self._at(stream, position, next(documents))])
        tokens, reported = len(pending[0][1]), 0
        while True:
            while tokens <= self.sequence_length:
                pending.append(next(documents))
                tokens += len(pending[-1][1])
            start, pieces, room = pending[0][0], [], self.sequence_length + 1
            for _, document in pending:
                pieces.append(document[:room])
                room -= len(pieces[-1])
                if not room:
                    break
            rest = self.sequence_length  # the last token is only a target, and begins the next sequence
            while rest >= len(pending[0][1]):
                rest -= len(pending.popleft()[1])
            at, document = pending[0]
            pending[0] = at._replace(token=at.token + rest), document[rest:]
            tokens -= self.sequence_length
            sizes = [len(piece) for piece in pieces]
            packed = Packed(np.concatenate(pieces), sizes, self.sequence_length, self.tokenizer.bos, self.document_mask)
            skipped, reported = bad.examples[reported:], len(bad.examples)
            yield Streamed(stream, packed, start, pending[0][0], skipped)

    def _at(self, stream: int, position: Position, first: tuple[Position, np.ndarray]) -> tuple[Position, np.ndarray]:
        """Returns the rest of the first document that is read from `position` on."""
        at, document = first
        if position != Position() and (at[:3] != position[:3] or len(document) <= position.token):
            shard = self.shards_of(stream, position.of_pass)[position.shard].name
            raise CorpusError(
                f"data.path={self.path}: must hold the files of the checkpoint: row {position.row} of {shard} is"
                " another document"
            )
        return at._replace(token=position.token), document[position.token :]

    def _documents(self, stream: int, position: Position, bad: BadDocuments) -> Iterator[tuple[Position, np.ndarray]]:
        """Yields the documents of a stream from the one at `position` on: the place of their first token, and their
        tokens, integers `[tokens]` that begin with bos."""
        *_, short, held_out, unreadable = position
        empty: set[str] = set()  # names of the shards since the last document, none of which has one
        for of_pass in count(position.of_pass):
            shards = self.shards_of(stream, of_pass)
            first = position.shard if of_pass == position.of_pass else 0
            for number, shard in enumerate(shards[first:], first):
                start = position.row if (of_pass, number) == position[:2] else 0
                empty.add(shard.name)
                for rows in _groups(read_shard(shard, start, self.text_column, bad)):
                    texts = {row: text for row, text in rows if text is not None and not self._is_held_out(text)}
                    documents = self._encode([f"{shard.name}:{row}" for row in texts], list(texts.values()))
                    for row, text in rows:
                        if text is None:
                            unreadable += 1
                        elif row not in texts:
                            held_out += 1
                        elif len(document := next(documents)) < self.shortest:
                            short += 1
                        else:
                            empty.clear()
                            yield Position(of_pass, number, row, 0, short, held_out, unreadable), document
                if len(empty) == len(self.shards):
                    raise CorpusError(
                        f"data.path={self.path}: must hold documents to train on, and {shard.name} and all other files"
                        " of the training split have none"
                    )

    def _is_held_out(self, text: str) -> bool:
        return len(text) in self.sizes and digest_of(text) in self.held_out

    def _encode(self, names: list[str], texts: list[str]) -> Iterator[np.ndarray]:
        """Yields bos and the tokens of each text."""
        if not texts:
            return
        tokens, counts = self.tokenizer.encode_all(names, texts)
        ends = np.cumsum(counts)
        tokens = np.insert(tokens.astype(self.dtype), ends - counts, self.tokenizer.bos)
        start = 0
        for end in (ends + np.arange(1, len(ends) + 1)).tolist():
            yield tokens[start:end]
            start = end


def _groups(rows: Iterator[tuple[int, str | None]]) -> Iterator[list[tuple[int, str | None]]]:
    """Yields consecutive rows that are encoded at once: about GROUP characters, or one long text."""
    group, size = [], 0
    for row, text in rows:
        length = len(text or "") + BESIDE_TEXT
        if group and size + length > GROUP:
            yield group
            group, size = [], 0
        group.append((row, text))
        size += length
    if group:
        yield group

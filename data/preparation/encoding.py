"""Tokenizes the documents of a split in several processes, range by range.

A range is consecutive documents of about RANGE bytes of text. Its tokens are appended to the file of the split, and a
record with their digest is written when they are complete (kept.py). If the preparation is killed, the next one of the
same corpus keeps the tokens of such a range instead of encoding it again.

Within a range, a process encodes one group after another: consecutive documents of about GROUP bytes, or a section of a
long document.
"""

import hashlib
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np

from ..sources.file_rows import rows_at_once, write_rows
from ..tokenizers import Tokenizer
from .arrays import save_array
from .kept import Kept

if TYPE_CHECKING:
    from datasets import Dataset

log = logging.getLogger(__name__)

PARALLEL_BYTES = 4_000_000  # text from which several processes encode faster than one
SECTION = 1 << 20  # characters of a document that one process encodes at once
GROUP = 1 << 18  # bytes of the documents that one process encodes at once
RANGE = 1 << 28  # bytes of text, which one core encodes in about a minute
BESIDE_TEXT = 32  # bytes that a document counts beside its text, so that a group has at most thousands of them
READ_AT_ONCE = 1 << 24  # bytes
FILE = 1 << 34  # bytes of tokens from which the next range begins another file


@dataclass
class EncodedSplit:
    """The documents of a split whose tokens are in one file or several, each of whole documents.

    lengths: tokens of each document, bos included. sizes: bytes of its text. normalized: whether its tokens stand for
        another text. Each is `[documents]`, the documents that are in no file included.
    content: the sha256 of the files, one after another.
    """

    files: list[Path]
    lengths: np.ndarray
    sizes: np.ndarray
    normalized: np.ndarray
    content: str


@dataclass
class Group:
    """What one process encodes at once: the rows `start` <= n < `stop` of the documents, or of the sections of long
    documents. `document`: the index of the first, or of the only one."""

    document: int
    start: int
    stop: int
    is_section: bool

    def documents(self) -> np.ndarray:
        """Returns the index of the document of each row."""
        rows = np.arange(self.stop - self.start)
        return self.document + (np.zeros_like(rows) if self.is_section else rows)


def encode(
    rows: "Dataset", split: str, kept: Kept, tokenizer: Tokenizer, dtype: str, shortest: int, scratch: Path
) -> EncodedSplit:
    """Writes bos and the tokens of each document of at least `shortest` tokens to files of `kept`.

    A long text is encoded in sections, so that several processes share it and the progress bar moves within it.

    rows: the documents, with `name` and `text`. kept: what an earlier preparation has finished, to which the ranges are
        added. dtype: of the tokens. scratch: a folder for intermediate files.

    Raises:
        CorpusError: the tokens of a document do not give its text back.
    """
    sizes = _sizes(rows)
    number = (np.cumsum(sizes) - sizes) // RANGE
    bounds = [0, *(np.flatnonzero(np.diff(number)) + 1).tolist(), len(rows)]
    files, arrays, content = [kept.path(f"{split}.bin")], [], hashlib.sha256()
    with ExitStack() as opened:
        stream = opened.enter_context(_open(files[-1]))
        for index, (start, stop) in enumerate(pairwise(bounds)):
            label = split if len(bounds) == 2 else f"{split} {index + 1}/{len(bounds) - 1}"
            if stream.tell() >= FILE:
                stream.truncate()
                files.append(kept.path(f"{split}.{len(files)}.bin"))
                stream = opened.enter_context(_open(files[-1]))
            name, place = f"{split}-{index:05}", stream.tell()
            made_from, counted = [dtype, shortest, start, stop, len(files), place], kept.path(f"{name}.npy")
            digest, whole = hashlib.sha256(), content.copy()
            record = kept.read(name, made_from)
            if record and _read(stream, record["bytes"], digest, whole) and digest.hexdigest() == record["tokens"]:
                log.info(f"tokenize {label}: finished before")
                content = whole
            else:
                stream.seek(place)
                digest = hashlib.sha256()
                encoded = _encode_range(rows, sizes, start, stop, tokenizer, dtype, scratch / name, label)
                for tokens in encoded.with_bos(tokenizer.bos, shortest):
                    stream.write(tokens)
                    digest.update(tokens)
                    content.update(tokens)
                stream.flush()
                save_array(counted, np.stack([encoded.lengths, encoded.normalized]))
                kept.write(name, [counted], made_from, tokens=digest.hexdigest(), bytes=stream.tell() - place)
                shutil.rmtree(scratch / name)
            arrays.append(np.load(counted, allow_pickle=False))
        stream.truncate()
    lengths, normalized = np.concatenate(arrays, axis=1)
    return EncodedSplit(files, lengths, sizes, normalized.astype(bool), content.hexdigest())


def _open(file: Path) -> BinaryIO:
    """Opens a file to read and to write, and creates it if it is missing."""
    return open(file, "r+b" if file.exists() else "w+b")


def _read(stream: BinaryIO, size: int, *digests: "hashlib._Hash") -> bool:
    """Adds the next `size` bytes to the digests. Returns whether the file has so many."""
    while size and (content := stream.read(min(size, READ_AT_ONCE))):
        size -= len(content)
        for digest in digests:
            digest.update(content)
    return not size


class _EncodedRange:
    """The encoded groups of a range, in the order of the documents.

    table: a row for each group, with `tokens` (without bos) and the lists `counts` (tokens) and `normalized` of the
        group's rows. order: the row of each group. first, last: the documents are `first` <= n < `last`.
    """

    def __init__(self, table: "Dataset", order: np.ndarray, groups: list[Group], first: int, last: int):
        self.table = table.with_format("arrow")
        self.order = order.tolist()
        self.groups = groups
        self.lengths = np.ones(last - first, dtype=np.int64)  # bos
        self.normalized = np.zeros(last - first, dtype=np.int64)
        self.documents = [group.documents() - first for group in groups]
        self.counts = [self._column(number, "counts") for number in range(len(groups))]
        for number, document in enumerate(self.documents):
            np.add.at(self.lengths, document, self.counts[number])
            np.maximum.at(self.normalized, document, self._column(number, "normalized"))

    def _column(self, group: int, name: str) -> np.ndarray:
        row = self.order[group]
        return self.table[row : row + 1].column(name)[0].values.to_numpy(zero_copy_only=False)

    def with_bos(self, bos: int, shortest: int) -> Iterator[np.ndarray]:
        """Yields the tokens of each group, with bos before each document, of documents of at least `shortest`."""
        before = -1
        for number, document in enumerate(self.documents):
            counts, tokens = self.counts[number], self._column(number, "tokens")
            begins = np.diff(document, prepend=before) > 0
            before = document[-1]
            tokens = np.insert(tokens, (np.cumsum(counts) - counts)[begins], bos)
            kept = self.lengths[document] >= shortest
            yield tokens if kept.all() else tokens[np.repeat(kept, counts + begins)]


def _encode_range(
    rows: "Dataset",
    sizes: np.ndarray,
    first: int,
    last: int,
    tokenizer: Tokenizer,
    dtype: str,
    scratch: Path,
    label: str,
) -> _EncodedRange:
    """Encodes the documents `first` <= n < `last`. `datasets` writes the groups to files in `scratch`."""
    from datasets import Dataset, Features, List, Value

    scratch.mkdir(parents=True)
    groups: list[Group] = []
    sections = write_rows(_sections(rows, sizes, first, last, tokenizer, groups), scratch / "sections")
    text = int(sizes[first:last].sum())
    processes = min(len(os.sched_getaffinity(0)), len(groups)) if text > PARALLEL_BYTES else 1
    # Each process takes consecutive rows. Sources put long documents first, so groups are dealt out in turn.
    dealt = np.concatenate([np.arange(process, len(groups), processes) for process in range(processes)])
    columns = {name: [getattr(groups[group], name) for group in dealt] for name in ("start", "stop", "is_section")}
    table = Dataset.from_dict(columns).map(
        _encode_group,
        batched=True,
        batch_size=1,
        writer_batch_size=1,
        fn_kwargs={
            "documents": rows,
            "sections": sections,
            "tokenizer": tokenizer,
            "dtype": dtype,
            "several_processes": processes > 1,
        },
        remove_columns=list(columns),
        features=Features(
            {"tokens": List(Value(dtype)), "counts": List(Value("int64")), "normalized": List(Value("bool"))}
        ),
        num_proc=processes if processes > 1 else None,
        cache_file_name=str(scratch / "encoded.arrow"),
        load_from_cache_file=False,
        new_fingerprint="encoded",  # or `datasets` would hash the documents
        desc=f"tokenize {label}",
    )
    return _EncodedRange(table, np.argsort(dealt), groups, first, last)


def _sections(
    rows: "Dataset", sizes: np.ndarray, first: int, last: int, tokenizer: Tokenizer, groups: list[Group]
) -> Iterator[dict[str, str]]:
    """Yields the sections of the long documents among `first` <= n < `last`, and adds all groups to `groups`."""
    long = sizes[first:last] > SECTION
    number = np.cumsum(sizes[first:last] + BESIDE_TEXT) // GROUP
    begins = (np.diff(number, prepend=-1) > 0) | long | np.append(False, long[:-1])
    starts = (np.flatnonzero(begins) + first).tolist()
    count = 0
    for start, stop in pairwise([*starts, last]):
        if not long[start - first]:
            groups.append(Group(start, start, stop, False))
            continue
        row = rows[start]
        for text in tokenizer.chunks(row["text"], SECTION):
            if len(text) > 2 * SECTION:
                log.warning(
                    f"{tokenizer.origin}: {row['name']} has {len(text):,} characters without a place to cut, which"
                    " are encoded in one process and in memory"
                )
            groups.append(Group(start, count, count + 1, True))
            count += 1
            yield {"name": row["name"], "text": text}


def _encode_group(
    batch: dict, documents: "Dataset", sections: "Dataset", tokenizer: Tokenizer, dtype: str, several_processes: bool
) -> dict:
    if several_processes:  # more threads than cores would slow all of them
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
    (start,), (stop,), (is_section,) = batch["start"], batch["stop"], batch["is_section"]
    table = (sections if is_section else documents).with_format("arrow")[start:stop]
    texts = table.column("text").to_pylist()
    tokens, counts = tokenizer.encode_all(table.column("name").to_pylist(), texts)
    normalized = np.array([tokenizer.normalized(text) != text for text in texts])
    return {"tokens": [tokens.astype(dtype)], "counts": [counts], "normalized": [normalized]}


def _sizes(rows: "Dataset") -> np.ndarray:
    """Returns the UTF-8 bytes of each text, int64 `[documents]`."""
    import pyarrow.compute

    tables = rows.select_columns("text").with_format("arrow").iter(rows_at_once(rows))
    return np.concatenate([pyarrow.compute.binary_length(each.column("text")).to_numpy() for each in tables]).astype(
        np.int64
    )

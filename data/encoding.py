"""Tokenizes the documents of a split in several processes.

The documents are encoded in ranges of about RANGE bytes of text. `datasets` writes the tokens of a range to its own
files. When these are complete, their digests are written beside them, with a digest of the texts and the tokenizer. If
the preparation is killed, the next one of the same corpus reads such a range instead of encoding it. A split of only
one range is always encoded again.
"""

import hashlib
import json
import logging
import os
from collections.abc import Iterator
from itertools import chain, pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from .digests import digests_of
from .sources.file_rows import rows_at_once, texts_of, write_rows
from .tokenizers import Tokenizer

if TYPE_CHECKING:
    from datasets import Dataset

log = logging.getLogger(__name__)

PARALLEL_BYTES = 4_000_000  # text from which several processes encode faster than one
SECTION = 1 << 20  # characters of a document that one process encodes at once
RANGE = 1 << 28  # bytes of text, which one core encodes in about a minute


class Encoded:
    """The encoded documents of a split, each in one or more sections.

    ranges: rows of `tokens` (lists, without bos), `bytes` (int64) and `normalized` (bool: the tokens stand for another
        text). counts: int64 `[documents]`, the sections of each document.
    """

    def __init__(self, ranges: "list[Dataset]", counts: np.ndarray):
        self.ranges = ranges
        self.counts = counts

    def sections(self) -> Iterator[np.ndarray]:
        """Yields the tokens of each section."""
        for part in self.ranges:
            for table in part.select_columns("tokens").with_format("arrow").iter(rows_at_once(part)):
                for column in table.column("tokens").chunks:
                    values = column.values.to_numpy()
                    for start, stop in zip(column.offsets[:-1].tolist(), column.offsets[1:].tolist(), strict=True):
                        yield values[start:stop]

    def column(self, name: str) -> np.ndarray:
        """Returns `bytes` or `normalized` of all sections."""
        tables = (part.select_columns(name).with_format("arrow")[:] for part in self.ranges)
        return np.concatenate([table.column(name).to_numpy() for table in tables])


def encode(rows: "Dataset", tokenizer: Tokenizer, dtype: str, scratch: Path, finished: Path, split: str) -> Encoded:
    """Encodes rows of `name` and `text`. A long text is encoded in sections, so that several processes share it and
    the progress bar moves within it.

    dtype: of the tokens. scratch: a folder for files of this preparation. finished: a folder beside tokenizer.json for
        the files of finished ranges, which the next preparation reads if this one is killed.

    Raises:
        CorpusError: the tokens of a document do not give its text back.
    """
    counts = []

    def sections() -> Iterator[dict[str, str]]:
        names = chain.from_iterable(batch["name"] for batch in rows.select_columns("name").iter(1000))
        for name, whole in zip(names, texts_of(rows), strict=True):
            counts.append(0)
            for text in tokenizer.chunks(whole, SECTION):
                counts[-1] += 1
                if len(text) > 2 * SECTION:
                    log.warning(
                        f"{tokenizer.origin}: {name} has {len(text):,} characters without a place to cut, which"
                        " are encoded in one process and in memory"
                    )
                yield {"name": name, "text": text}

    texts = write_rows(sections(), scratch / f"{split}.sections")
    bounds = np.linspace(0, len(texts), -(-texts.data.nbytes // RANGE) + 1).astype(int)
    ranges = []
    for number, (start, stop) in enumerate(pairwise(bounds)):
        part = texts.select(range(start, stop))
        if len(bounds) == 2:
            ranges.append(_encode(part, tokenizer, dtype, scratch / f"{split}.arrow", split))
        else:
            label = f"{split} {number + 1}/{len(bounds) - 1}"
            ranges.append(_encode_once(part, tokenizer, dtype, finished / f"{split}-{number:05}", label))
    return Encoded(ranges, np.array(counts, dtype=np.int64))


def _encode_once(texts: "Dataset", tokenizer: Tokenizer, dtype: str, prefix: Path, label: str) -> "Dataset":
    """Encodes a range, unless files of an earlier preparation hold its tokens. Their names begin with `prefix`."""
    record = prefix.with_suffix(".json")
    saved_tokenizer = prefix.parent.with_name("tokenizer.json").read_bytes()
    made_from = hashlib.sha256(json.dumps([tokenizer.identity(), dtype, _processes(texts)]).encode() + saved_tokenizer)
    for text in texts_of(texts):
        made_from.update(hashlib.sha256(text.encode()).digest())
    cache_file = prefix.with_suffix(".arrow")
    if _is_finished(record, made_from.hexdigest()):
        log.info(f"tokenize {label}: finished before")
        return _encode(texts, tokenizer, dtype, cache_file, label)
    for leftover in prefix.parent.glob(f"{prefix.name}*"):
        leftover.unlink()
    prefix.parent.mkdir(exist_ok=True)
    encoded = _encode(texts, tokenizer, dtype, cache_file, label)
    files = sorted(prefix.parent.glob(f"{prefix.name}*.arrow"))
    digests = dict(zip([file.name for file in files], digests_of(files, None), strict=True))
    record.write_text(json.dumps({"made_from": made_from.hexdigest(), "digests": digests}))
    return encoded


def _is_finished(record: Path, made_from: str) -> bool:
    try:
        saved = json.loads(record.read_text())
        found = digests_of([record.with_name(name) for name in saved["digests"]], None)
        return saved["made_from"] == made_from and found == list(saved["digests"].values())
    except (OSError, ValueError, KeyError):
        return False


def _encode(texts: "Dataset", tokenizer: Tokenizer, dtype: str, cache_file: Path, label: str) -> "Dataset":
    """Encodes rows of `name` and `text`. `datasets` writes the tokens to `cache_file`, or to one file for each process
    beside it. Files that exist are opened instead."""
    from datasets import Features, List, Value

    processes, at_once = _processes(texts), rows_at_once(texts)
    # Each process encodes a contiguous range of rows. Sources put long documents first, so rows are dealt out in turn:
    # one by one if they are long, and else in groups, which are faster to read.
    dealt = np.concatenate(
        [
            np.arange(start, min(start + at_once, len(texts)))
            for process in range(processes)
            for start in range(process * at_once, len(texts), processes * at_once)
        ]
    )
    encoded = (texts.select(dealt) if processes > 1 else texts).map(
        _encode_batch,
        batched=True,
        batch_size=max(at_once, 16),
        fn_kwargs={"tokenizer": tokenizer, "several_processes": processes > 1},
        remove_columns=["name", "text"],
        features=Features({"bytes": Value("int64"), "tokens": List(Value(dtype)), "normalized": Value("bool")}),
        num_proc=processes if processes > 1 else None,
        cache_file_name=str(cache_file),
        load_from_cache_file=True,
        desc=f"tokenize {label}",
    )
    return encoded.select(np.argsort(dealt)) if processes > 1 else encoded


def _processes(texts: "Dataset") -> int:
    size = texts.data.nbytes * len(texts) / len(texts.data)  # `texts` may be some rows of its table
    return min(len(os.sched_getaffinity(0)), len(texts)) if size > PARALLEL_BYTES else 1


def _encode_batch(batch: dict, tokenizer: Tokenizer, several_processes: bool) -> dict:
    if several_processes:  # more threads than cores would slow all of them
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
    tokens = [tokenizer.encode_checked(*each) for each in zip(batch["name"], batch["text"], strict=True)]
    return {
        "bytes": [len(text.encode()) for text in batch["text"]],
        "tokens": tokens,
        "normalized": [tokenizer.normalized(text) != text for text in batch["text"]],
    }

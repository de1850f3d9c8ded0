"""Writes a tokenized corpus to a folder.

source.load (datasets, Arrow) -> tokenizer.fit on train -> map(encode) -> one flat file of tokens for each split
"""

import hashlib
import io
import json
import logging
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from .corpus import SplitMetadata
from .digests import digests_of
from .errors import CorpusError
from .sources import SPLITS, BadDocuments, Source
from .sources.base import Paths
from .sources.file_rows import write_rows
from .sources.splits import warn_of_copies
from .tokenizers import Tokenizer
from .tokenizers.base import warn_of_normalized

if TYPE_CHECKING:
    from datasets import Dataset

log = logging.getLogger(__name__)

PARALLEL_BYTES = 4_000_000  # text from which several processes encode faster than one
SECTION = 1 << 20  # characters of a document that one process encodes at once
SHORTEST = 2  # tokens: bos and one more, since an empty document has no target


def write(
    folder: Path,
    fingerprint: str,
    made_from: dict,
    source: Source,
    path: Paths,
    tokenizer: Tokenizer,
    minimum_tokens: int,
    on_bad_document: str,
) -> None:
    """Writes the files of a corpus (see corpus.py) to `folder`, which exists and is empty, and flushes them to disk.

    Raises:
        CorpusError: a split has no document, or none with enough tokens, or a document cannot be read.
    """
    started = time.perf_counter()
    bad = BadDocuments(on_bad_document, path)
    arrow_cache = folder / "arrow"  # intermediate files of `datasets`
    log.info(f"preparing corpus {fingerprint[:12]}")
    documents = {split: rows for split, rows in source.load(path, arrow_cache, bad).items() if len(rows)}
    _check_splits(documents, path)
    warn_of_copies(documents)
    tokenizer.fit(row["text"] for row in documents["train"])
    log.info(f"tokenizer ready: vocabulary {tokenizer.vocabulary:,}, after {time.perf_counter() - started:.1f} s")
    tokenizer.save(folder / "tokenizer.json")

    dtype = "uint16" if tokenizer.vocabulary <= 1 << 16 else "uint32"
    splits = {}
    for split, rows in documents.items():
        encoded = encode(rows, tokenizer, dtype, arrow_cache / f"{split}.arrow")
        splits[split] = asdict(write_split(folder / split, rows, *encoded, tokenizer, minimum_tokens, path))
    shutil.rmtree(arrow_cache, ignore_errors=True)

    metadata = {
        "fingerprint": fingerprint,
        "made_from": made_from,
        "dtype": dtype,
        "splits": splits,
        **({"skipped": bad.summary()} if bad.count else {}),
    }
    finish(folder, metadata)
    log.info(f"corpus {fingerprint[:12]} prepared in {time.perf_counter() - started:.1f} s")


def finish(folder: Path, metadata: dict) -> None:
    """Writes metadata.json, with the sizes and digests of the files of a corpus, and flushes all of them to disk."""
    files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
    opened = [file for file in files if file.suffix == ".npy" or file.name == "tokenizer.json"]
    metadata |= {
        "digests": {
            file.relative_to(folder).as_posix(): digest
            for file, digest in zip(opened, digests_of(opened, None), strict=True)
        },
        "sizes": {file.relative_to(folder).as_posix(): file.stat().st_size for file in files},
    }
    (folder / "metadata.json").write_text(json.dumps(metadata, indent=1))
    for written in (*folder.rglob("*"), folder):
        flush(written)


def encode(rows: "Dataset", tokenizer: Tokenizer, dtype: str, cache_file: Path) -> "tuple[Dataset, np.ndarray]":
    """Encodes rows of `name` and `text`. A long text is encoded in sections, so that several processes share it and
    the progress bar moves within it.

    Returns (sections, counts). sections: rows of `tokens` (lists of `dtype`, without bos), `bytes` (int64) and
        `normalized` (bool: the tokens stand for another text). counts: int64 `[rows]`, the sections of each row.

    Raises:
        CorpusError: the tokens of a document do not give its text back.
    """
    from datasets import Features, List, Value

    counts = []

    def sections() -> Iterator[dict[str, str]]:
        for row in rows:
            counts.append(0)
            for text in tokenizer.chunks(row["text"], SECTION):
                counts[-1] += 1
                if len(text) > 2 * SECTION:
                    log.warning(
                        f"{tokenizer.origin}: {row['name']} has {len(text):,} characters without a place to cut, which"
                        " are encoded in one process and in memory"
                    )
                yield {"name": row["name"], "text": text}

    texts = write_rows(sections(), cache_file.with_suffix(".sections"))
    processes = min(len(os.sched_getaffinity(0)), len(texts)) if texts.data.nbytes > PARALLEL_BYTES else 1
    # Each process encodes a contiguous range of rows. Sources put long documents first, so rows are dealt out in turn.
    dealt = [row for process in range(processes) for row in range(process, len(texts), processes)]
    encoded = texts.select(dealt).map(
        _encode_batch,
        batched=True,
        batch_size=16,
        fn_kwargs={"tokenizer": tokenizer, "several_processes": processes > 1},
        remove_columns=["name", "text"],
        features=Features({"bytes": Value("int64"), "tokens": List(Value(dtype)), "normalized": Value("bool")}),
        num_proc=processes if processes > 1 else None,
        cache_file_name=str(cache_file),
        desc=f"tokenize {cache_file.stem}",
    )
    return encoded.select(np.argsort(dealt)), np.array(counts, dtype=np.int64)


def write_split(
    folder: Path,
    rows: "Dataset",
    encoded: "Dataset",
    counts: np.ndarray,
    tokenizer: Tokenizer,
    minimum_tokens: int,
    path: Paths,
) -> SplitMetadata:
    """Writes the folder of one split, named after it: documents of at least `minimum_tokens`, in their order.

    rows: the documents. encoded, counts: what `encode` returned for them under `tokenizer`.
    """
    split = folder.name
    folder.mkdir()
    shortest = max(minimum_tokens, SHORTEST)
    dtype = encoded.features["tokens"].feature.dtype
    sections = iter(encoded.with_format("numpy", columns=["tokens"]))
    kept, lengths, longest, dropped_tokens, digest = [], [], 0, 0, hashlib.sha256()
    with open(folder / "tokens.bin", "wb") as file:
        for index, count in enumerate(counts):
            encoded_sections = (row["tokens"].astype(dtype, copy=False) for row in islice(sections, count))
            parts = [np.array([tokenizer.bos], dtype), *encoded_sections]
            length = sum(map(len, parts))
            longest = max(longest, length)
            if length >= shortest:
                for part in parts:
                    file.write(part.tobytes())
                    digest.update(part.tobytes())
                kept.append(index)
                lengths.append(length)
            else:
                dropped_tokens += length
    document = np.repeat(np.arange(len(rows)), counts)
    warn_of_normalized(
        tokenizer, len(np.unique(document[np.array(encoded["normalized"], dtype=bool)])), len(rows), f"{split}: "
    )
    sizes = np.zeros(len(rows), dtype=np.int64)
    np.add.at(sizes, document, np.array(encoded["bytes"], dtype=np.int64))
    dropped, dropped_bytes = len(rows) - len(kept), int(sizes.sum() - sizes[kept].sum())
    if dropped:
        log.warning(
            f"{split}: {dropped} of {len(rows)} documents dropped: shorter than {shortest} tokens; {dropped_tokens:,}"
            f" of {dropped_tokens + sum(lengths):,} tokens, {dropped_bytes:,} of {sizes.sum():,} bytes"
        )
    if not kept and longest < SHORTEST:
        raise CorpusError(f"data.path={path}: must hold documents with text, and those of the {split} split are empty")
    if not kept:
        known = f"{longest}, the length of the longest document of the {split} split"
        raise CorpusError(f"data.minimum_tokens={minimum_tokens}: must be at most {known}")
    save_array(folder / "offsets.npy", np.cumsum([0, *lengths], dtype=np.int64))
    save_array(folder / "bytes.npy", sizes[kept])
    rows.select(kept).select_columns(["name", "text"]).save_to_disk(folder / "documents")
    kept_bytes = int(sizes[kept].sum())
    return SplitMetadata(
        len(kept), sum(lengths), kept_bytes, dropped, digest.hexdigest(), dropped_tokens, dropped_bytes
    )


def flush(path: Path) -> None:
    """Waits until a file or folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _check_splits(documents: "dict[str, Dataset]", path: Paths) -> None:
    if not documents:
        raise CorpusError(f"data.path={path}: must hold documents, and none was found")
    for split in SPLITS:
        if split not in documents:
            counts = ", ".join(f"{len(rows)} in {name}" for name, rows in documents.items())
            raise CorpusError(
                f"data.path={path}: must hold documents of every split, and the {split} split has none ({counts}); add"
                " documents, or put them into folders train/, validation/ and test/"
            )


def _encode_batch(batch: dict, tokenizer: Tokenizer, several_processes: bool) -> dict:
    if several_processes:  # more threads than cores would slow all of them
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
    tokens = [tokenizer.encode_checked(*each) for each in zip(batch["name"], batch["text"], strict=True)]
    return {
        "bytes": [len(text.encode()) for text in batch["text"]],
        "tokens": tokens,
        "normalized": [tokenizer.normalized(text) != text for text in batch["text"]],
    }


def save_array(file: Path, numbers: np.ndarray) -> None:
    """Writes an array as .npy."""
    content = io.BytesIO()  # an error of NumPy's own writing to a full disk has no error number
    np.save(content, numbers)
    file.write_bytes(content.getvalue())

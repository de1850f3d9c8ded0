"""Writes a tokenized corpus to a folder.

source.load (datasets, Arrow) -> tokenizer.fit on train -> encode (encoding.py) -> a flat file of tokens for each split

Each step leaves files in `finished` (kept.py). They become the corpus by their renaming.
"""

import json
import logging
import os
import shutil
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..corpus.corpus import SEVERAL
from ..corpus.split import SplitMetadata
from ..digests import digests_of
from ..errors import CorpusError
from ..sources import SPLITS, BadDocuments, Source
from ..sources.base import Paths
from ..sources.file_rows import texts_of
from ..sources.splits import warn_of_copies
from ..tokenizers import Tokenizer
from ..tokenizers.base import warn_of_normalized
from .arrays import save_array
from .encoding import EncodedSplit, encode
from .kept import Kept

if TYPE_CHECKING:
    from datasets import Dataset

log = logging.getLogger(__name__)

FINISHED = "finished"
"""The folder of what the next preparation does not repeat if this one is killed (kept.py)."""

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
    """Writes the files of a corpus (../corpus/corpus.py lists them) to `folder`, which exists, and flushes them to
    disk. If an earlier preparation of this corpus was killed, what it finished is not done again: reading the
    documents, learning the tokenizer, encoding a range (encoding.py).

    Raises:
        CorpusError: a split has no document, or none with enough tokens, or a document cannot be read.
    """
    started = time.perf_counter()
    arrow_cache = folder / "arrow"  # intermediate files of `datasets`
    for leftover in folder.iterdir():
        if leftover.name != FINISHED:
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
    kept = Kept(folder / FINISHED, fingerprint)
    log.info(f"preparing corpus {fingerprint[:12]}")
    documents, skipped = _documents(source, path, on_bad_document, kept, arrow_cache)
    warn_of_copies(documents)
    _fit(tokenizer, documents["train"], kept)
    log.info(f"tokenizer ready: vocabulary {tokenizer.vocabulary:,}, after {time.perf_counter() - started:.1f} s")
    tokenizer.save(folder / "tokenizer.json")
    kept.add((folder / "tokenizer.json").read_bytes())

    dtype = "uint16" if tokenizer.vocabulary <= 1 << 16 else "uint32"
    shortest = max(minimum_tokens, SHORTEST)
    encoded = {}
    for split, rows in documents.items():
        encoded[split] = encode(rows, split, kept, tokenizer, dtype, shortest, arrow_cache)
        changed = int(encoded[split].normalized.sum())
        warn_of_normalized(tokenizer, changed, len(rows), f"{split}: ")
        _check_lengths(encoded[split].lengths, split, minimum_tokens, path)
        for file in encoded[split].files:
            flush(file)
    splits = {split: asdict(_write_split(folder / split, encoded[split], kept, shortest)) for split in documents}
    for scratch in (arrow_cache, kept.folder):
        shutil.rmtree(scratch, ignore_errors=True)

    metadata = {
        "fingerprint": fingerprint,
        "made_from": made_from,
        "dtype": dtype,
        "splits": splits,
        **({"skipped": skipped} if skipped else {}),
    }
    finish(folder, metadata)
    log.info(f"corpus {fingerprint[:12]} prepared in {time.perf_counter() - started:.1f} s")


def _documents(
    source: Source, path: Paths, on_bad_document: str, kept: Kept, arrow_cache: Path
) -> "tuple[dict[str, Dataset], dict | None]":
    """Returns the documents of each split, in files of `kept`, and the summary of those that were skipped or repaired;
    None if there were none. Adds the documents to the basis of `kept`."""
    from datasets import load_from_disk

    folders = {split: kept.path(f"{split}.documents") for split in SPLITS}
    record = kept.read("documents")
    if record is None:
        bad = BadDocuments(on_bad_document, path)
        loaded = {split: rows for split, rows in source.load(path, arrow_cache, bad).items() if len(rows)}
        _check_splits(loaded, path, source.more_splits)
        for split, rows in loaded.items():
            shutil.rmtree(folders[split], ignore_errors=True)
            rows.select_columns(["name", "text"]).save_to_disk(folders[split])
        files = [file for folder in folders.values() for file in sorted(folder.glob("*.arrow"))]
        kept.write("documents", files, skipped=bad.summary() if bad.count else None)
        record = kept.read("documents")
        assert record is not None, "it was written by this process"
        shutil.rmtree(arrow_cache, ignore_errors=True)
    else:
        log.info("documents: read before")
    kept.add(json.dumps(record["digests"]).encode())
    return {split: load_from_disk(str(folder)) for split, folder in folders.items()}, record["skipped"]


def _fit(tokenizer: Tokenizer, train: "Dataset", kept: Kept) -> None:
    """Trains the tokenizer, unless an earlier preparation has kept what it learned."""
    file = kept.path("learned.json")
    if kept.read("tokenizer", tokenizer.identity()) and tokenizer.reopen(file):
        log.info("tokenizer: learned before")
        return
    tokenizer.fit(texts_of(train))
    tokenizer.save(file)
    kept.write("tokenizer", [file], tokenizer.identity())


def _check_lengths(lengths: np.ndarray, split: str, minimum_tokens: int, path: Paths) -> None:
    longest = int(lengths.max())
    if longest < SHORTEST:
        raise CorpusError(f"data.path={path}: must hold documents with text, and those of the {split} split are empty")
    if longest < minimum_tokens:
        known = f"{longest}, the length of the longest document of the {split} split"
        raise CorpusError(f"data.minimum_tokens={minimum_tokens}: must be at most {known}")


def finish(folder: Path, metadata: dict) -> None:
    """Writes metadata.json, with the sizes and digests of the files of a corpus, and flushes all of them to disk."""
    files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
    opened = [file for file in files if file.suffix == ".npy" or file.name == "tokenizer.json" or SEVERAL in file.name]
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


def _write_split(folder: Path, encoded: EncodedSplit, kept: Kept, shortest: int) -> SplitMetadata:
    """Writes the folder of one split, named after it, from its files of `kept`."""
    from datasets import load_from_disk

    folder.mkdir()
    documents, chosen = kept.path(f"{folder.name}.documents"), encoded.lengths >= shortest
    if chosen.all():
        os.rename(documents, folder / "documents")
    else:
        load_from_disk(str(documents)).select(np.flatnonzero(chosen)).save_to_disk(folder / "documents")
    for number, file in enumerate(encoded.files):
        os.rename(file, folder / ("tokens.bin" if len(encoded.files) == 1 else f"{SEVERAL}{number:05}.bin"))
    return write_sizes(folder, encoded.lengths, encoded.sizes, shortest, encoded.content)


def write_sizes(folder: Path, lengths: np.ndarray, sizes: np.ndarray, shortest: int, content: str) -> SplitMetadata:
    """Writes offsets.npy and bytes.npy of a split, for its documents of at least `shortest` tokens. Logs how many
    others are dropped.

    lengths, sizes: tokens and bytes of text of each document, int64 `[documents]`, the short ones included.
    content: the sha256 of the tokens that are kept.
    """
    kept = lengths >= shortest
    dropped, dropped_tokens, dropped_bytes = (int(each[~kept].sum()) for each in (~kept, lengths, sizes))
    if dropped:
        log.warning(
            f"{folder.name}: {dropped} of {len(kept)} documents dropped: shorter than {shortest} tokens;"
            f" {dropped_tokens:,} of {lengths.sum():,} tokens, {dropped_bytes:,} of {sizes.sum():,} bytes"
        )
    save_array(folder / "offsets.npy", np.append(0, np.cumsum(lengths[kept])))
    save_array(folder / "bytes.npy", sizes[kept])
    tokens, size = int(lengths[kept].sum()), int(sizes[kept].sum())
    return SplitMetadata(int(kept.sum()), tokens, size, dropped, content, dropped_tokens, dropped_bytes)


def flush(path: Path) -> None:
    """Waits until a file or folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _check_splits(documents: "dict[str, Dataset]", path: Paths, more_splits: str) -> None:
    if not documents:
        raise CorpusError(f"data.path={path}: must hold documents, and none was found")
    for split in SPLITS:
        if split not in documents:
            counts = ", ".join(f"{len(rows)} in {name}" for name, rows in documents.items())
            raise CorpusError(
                f"data.path={path}: must hold documents of every split, and the {split} split has none ({counts});"
                f" {more_splits}"
            )

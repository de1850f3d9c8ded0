"""Writes a tokenized corpus to a folder.

source.load (datasets, Arrow) -> tokenizer.fit on train -> encode (encoding.py) -> a flat file of tokens for each split
"""

import hashlib
import io
import json
import logging
import os
import shutil
import time
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from .digests import digests_of
from .encoding import Encoded, encode
from .errors import CorpusError
from .sources import SPLITS, BadDocuments, Source
from .sources.base import Paths
from .sources.file_rows import texts_of
from .sources.splits import warn_of_copies
from .split import SplitMetadata
from .tokenizers import Tokenizer
from .tokenizers.base import warn_of_normalized

if TYPE_CHECKING:
    from datasets import Dataset

log = logging.getLogger(__name__)

FINISHED = "finished"
"""The folder of encoded ranges, which the next preparation reads if this one is killed."""

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
    """Writes the files of a corpus (corpus.py lists them) to `folder`, which exists, and flushes them to disk. If an
    earlier preparation of this corpus was killed, its finished ranges (encoding.py) are not encoded again.

    Raises:
        CorpusError: a split has no document, or none with enough tokens, or a document cannot be read.
    """
    started = time.perf_counter()
    bad = BadDocuments(on_bad_document, path)
    arrow_cache = folder / "arrow"  # intermediate files of `datasets`
    finished = folder / FINISHED
    for leftover in (*folder.iterdir(), *finished.glob("tmp*")):
        if leftover != finished:
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
    log.info(f"preparing corpus {fingerprint[:12]}")
    documents = {split: rows for split, rows in source.load(path, arrow_cache, bad).items() if len(rows)}
    _check_splits(documents, path)
    warn_of_copies(documents)
    tokenizer.fit(texts_of(documents["train"]))
    log.info(f"tokenizer ready: vocabulary {tokenizer.vocabulary:,}, after {time.perf_counter() - started:.1f} s")
    tokenizer.save(folder / "tokenizer.json")

    dtype = "uint16" if tokenizer.vocabulary <= 1 << 16 else "uint32"
    splits = {}
    for split, rows in documents.items():
        encoded = encode(rows, tokenizer, dtype, arrow_cache, finished, split)
        splits[split] = asdict(write_split(folder / split, rows, encoded, dtype, tokenizer, minimum_tokens, path))
    for scratch in (arrow_cache, finished):
        shutil.rmtree(scratch, ignore_errors=True)

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


def write_split(
    folder: Path,
    rows: "Dataset",
    encoded: Encoded,
    dtype: str,
    tokenizer: Tokenizer,
    minimum_tokens: int,
    path: Paths,
) -> SplitMetadata:
    """Writes the folder of one split, named after it: documents of at least `minimum_tokens`, in their order.

    rows: the documents. encoded: those of `rows` under `tokenizer`.
    """
    split = folder.name
    folder.mkdir()
    shortest = max(minimum_tokens, SHORTEST)
    sections = encoded.sections()
    bos = np.array([tokenizer.bos], dtype)
    lengths, digest = np.zeros(len(rows), dtype=np.int64), hashlib.sha256()
    with open(folder / "tokens.bin", "wb") as file:
        for index, count in enumerate(encoded.counts):
            parts = [bos, *islice(sections, count)]
            lengths[index] = sum(map(len, parts))
            if lengths[index] >= shortest:
                for part in parts:
                    file.write(part.tobytes())
                    digest.update(part.tobytes())
    document = np.repeat(np.arange(len(rows)), encoded.counts)
    warn_of_normalized(tokenizer, len(np.unique(document[encoded.column("normalized")])), len(rows), f"{split}: ")
    sizes = np.zeros(len(rows), dtype=np.int64)
    np.add.at(sizes, document, encoded.column("bytes"))
    longest = int(lengths.max())
    if longest < SHORTEST:
        raise CorpusError(f"data.path={path}: must hold documents with text, and those of the {split} split are empty")
    if longest < shortest:
        known = f"{longest}, the length of the longest document of the {split} split"
        raise CorpusError(f"data.minimum_tokens={minimum_tokens}: must be at most {known}")
    kept = np.flatnonzero(lengths >= shortest).tolist()
    rows.select(kept).select_columns(["name", "text"]).save_to_disk(folder / "documents")
    return write_sizes(folder, lengths, sizes, shortest, digest.hexdigest())


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


def save_array(file: Path, numbers: np.ndarray) -> None:
    """Writes an array as .npy."""
    content = io.BytesIO()  # an error of NumPy's own writing to a full disk has no error number
    np.save(content, numbers)
    file.write_bytes(content.getvalue())

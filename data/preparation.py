"""Documents to a tokenised corpus on disk, once.

    source.load (datasets, Arrow) -> tokenizer.fit on train -> map(encode) -> one flat file of tokens a split

The folder (corpus.py says what is in it) is written under another name, flushed to disk, and renamed when it is
complete. So a crash leaves no corpus rather than half of one; a file that lost bytes since then is noticed by its size,
and the corpus is made again.
"""

import contextlib
import errno
import hashlib
import io
import json
import logging
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from . import tokenizers
from .corpus import Corpus, SplitMetadata
from .errors import CorpusError
from .sources import SPLITS, Source

if TYPE_CHECKING:
    import rich.table
    from datasets import Dataset

log = logging.getLogger(__name__)

FULL = errno.ENOSPC, errno.EDQUOT
FORMAT = 1  # raise it when the same settings would now write something else
PARALLEL_BYTES = 4_000_000  # text for which it is worth starting another process


def prepare(
    source: Source, path: str | None, tokenizer: tokenizers.Tokenizer, minimum_tokens: int, cache: Path
) -> Corpus:
    """The corpus of these settings: opened where it is in `cache`, made otherwise. Safe to call from many processes.

    A tokenizer that was saved also opens the corpus for which it was trained, so a run that is opened again with its
    own tokenizer.json tokenizes nothing anew.
    """
    from filelock import FileLock

    source.check(path)
    made_from = {
        "format": FORMAT,
        "source": source.identity(path),
        "tokenizer": tokenizer.identity(),
        "minimum_tokens": minimum_tokens,
    }
    fingerprint = hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()[:32]
    folder = Path(cache) / fingerprint
    if corpus := _open(folder) or _open_trained_for(tokenizer, made_from, folder.parent):
        return corpus
    with _naming(folder.parent):
        folder.parent.mkdir(parents=True, exist_ok=True)
    with _naming(folder.parent), FileLock(folder.with_suffix(".lock")):  # released when its process dies
        if corpus := _open(folder):  # another process made it while we waited
            return corpus
        for leftover in (folder, *folder.parent.glob(f"{fingerprint}.part*")):
            shutil.rmtree(leftover, ignore_errors=True)
        part = folder.with_suffix(f".part{os.getpid()}")
        part.mkdir()
        try:
            _write(part, fingerprint, made_from, source, path, tokenizer, minimum_tokens)
            os.rename(part, folder)
        finally:
            shutil.rmtree(part, ignore_errors=True)
        _flush(folder.parent)
    corpus = Corpus(folder)
    _log_table(corpus.report())
    return corpus


@contextlib.contextmanager
def _naming(cache: Path) -> Iterator[None]:
    """While inside, a full disk, a read-only file system or a plain file in the cache's place is a CorpusError."""
    try:
        yield
    except Exception as error:
        cause: BaseException | None = error  # `datasets` raises errors of its own after the system's
        while cause is not None and not (isinstance(cause, OSError) and _concerns(cause, cache.absolute())):
            cause = cause.__cause__ or cause.__context__
        if cause is None:
            raise
        free = ""
        if cause.errno in FULL:
            place = next(place for place in (cache.absolute(), *cache.absolute().parents) if place.is_dir())
            free = f"; {shutil.disk_usage(place).free:,} bytes free"
        accepted = "a folder that can be written, with room for the corpus"
        raise CorpusError(f"data.cache={cache}: must be {accepted}: {cause.strerror}{free}") from error


def _concerns(error: OSError, cache: Path) -> bool:
    """Whether an error of the file system comes from writing the cache: documents are only read."""
    file = Path(str(error.filename or "")).absolute()
    return error.errno in (*FULL, errno.EFBIG, errno.EROFS) or (
        error.filename is not None and (file.is_relative_to(cache) or cache.is_relative_to(file))
    )


def _open(folder: Path) -> Corpus | None:
    if not folder.exists():
        return None
    try:
        return Corpus(folder)
    except CorpusError as error:
        log.warning(f"{error}: the corpus is prepared again")
        return None


def _open_trained_for(tokenizer: tokenizers.Tokenizer, made_from: dict, cache: Path) -> Corpus | None:
    """The corpus of the same documents from which this saved tokenizer was learned: it holds the same tokens."""
    if not isinstance(tokenizer, tokenizers.Saved):
        return None
    for file in sorted(cache.glob("*/metadata.json")):
        try:
            metadata = json.loads(file.read_text())
            same_documents = metadata["made_from"] | {"tokenizer": made_from["tokenizer"]} == made_from
            complete = metadata["fingerprint"] == file.parent.name  # and not the copy that a process is writing
        except (OSError, ValueError, KeyError):
            continue
        corpus = _open(file.parent) if same_documents and complete else None
        if corpus and corpus.tokenizer.identity() == tokenizer.identity():
            return corpus
    return None


def _write(
    folder: Path,
    fingerprint: str,
    made_from: dict,
    source: Source,
    path: str | None,
    tokenizer: tokenizers.Tokenizer,
    minimum_tokens: int,
) -> None:
    started = time.perf_counter()
    arrow_cache = folder / "arrow"  # what `datasets` leaves on the way
    log.info(f"preparing corpus {fingerprint[:12]}")
    documents = source.load(path, arrow_cache)
    documents = {split: rows for split, rows in documents.items() if len(rows)}
    if not documents:
        raise CorpusError(f"data.path={path}: must hold documents, and none was found")
    for split in SPLITS:
        if split not in documents:
            counts = ", ".join(f"{len(rows)} in {name}" for name, rows in documents.items())
            raise CorpusError(
                f"data.path={path}: must hold documents of every split, and the {split} split has none ({counts}); add"
                " documents, or put them into folders train/, validation/ and test/"
            )
    tokenizer.fit(row["text"] for row in documents["train"])
    log.info(f"tokenizer ready: vocabulary {tokenizer.vocabulary:,}, after {time.perf_counter() - started:.1f} s")
    tokenizer.save(folder / "tokenizer.json")

    dtype = "uint16" if tokenizer.vocabulary <= 1 << 16 else "uint32"
    splits = {}
    for split, rows in documents.items():
        written = _write_split(folder / split, split, path, rows, tokenizer, dtype, minimum_tokens, arrow_cache)
        splits[split] = asdict(written)
    shutil.rmtree(arrow_cache, ignore_errors=True)

    files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
    metadata = {
        "fingerprint": fingerprint,
        "made_from": made_from,
        "dtype": dtype,
        "splits": splits,
        "sizes": {file.relative_to(folder).as_posix(): file.stat().st_size for file in files},
    }
    (folder / "metadata.json").write_text(json.dumps(metadata, indent=1))
    for written in (*folder.rglob("*"), folder):
        _flush(written)
    log.info(f"corpus {fingerprint[:12]} prepared in {time.perf_counter() - started:.1f} s")


def _write_split(
    folder: Path,
    split: str,
    path: str | None,
    rows: "Dataset",
    tokenizer: tokenizers.Tokenizer,
    dtype: str,
    minimum_tokens: int,
    arrow_cache: Path,
) -> SplitMetadata:
    from datasets import Features, List, Value

    folder.mkdir()
    arrow_cache.mkdir(exist_ok=True)
    processes = min(len(os.sched_getaffinity(0)), len(rows)) if rows.data.nbytes > PARALLEL_BYTES else 1
    # Each process takes a run of rows; dealt out like cards, the long documents do not all fall to the first.
    dealt = [row for process in range(processes) for row in range(process, len(rows), processes)]
    encoded = rows.select(dealt)
    encoded = encoded.map(
        _encode,
        batched=True,
        batch_size=16,
        fn_kwargs={"tokenizer": tokenizer, "alone": processes > 1},
        features=Features(rows.features | {"bytes": Value("int64"), "tokens": List(Value(dtype))}),
        num_proc=processes if processes > 1 else None,
        cache_file_name=str(arrow_cache / f"{split}.arrow"),
        desc=f"tokenize {split}",
    )
    encoded = encoded.select(np.argsort(dealt))
    shortest = max(minimum_tokens, 2)  # bos and a token: an empty document would teach nothing
    kept, lengths, longest, digest = [], [], 0, hashlib.sha256()
    with open(folder / "tokens.bin", "wb") as file:
        for index, row in enumerate(encoded.with_format("numpy", columns=["tokens"])):
            tokens = row["tokens"].astype(dtype, copy=False)
            longest = max(longest, len(tokens))
            if len(tokens) >= shortest:
                file.write(tokens.tobytes())
                digest.update(tokens.tobytes())
                kept.append(index)
                lengths.append(len(tokens))
    dropped = len(rows) - len(kept)
    if dropped:
        log.warning(f"{split}: {dropped} of {len(rows)} documents dropped: shorter than {shortest} tokens")
    if not kept:
        raise CorpusError(
            f"data.minimum_tokens={minimum_tokens}: must be at most {longest}, the length of the longest document of"
            f" the {split} split"
            if longest >= 2
            else f"data.path={path}: must hold documents with text, and every one of the {split} split is empty"
        )
    sizes = np.array(encoded["bytes"], dtype=np.int64)[kept]
    _save(folder / "offsets.npy", np.cumsum([0, *lengths], dtype=np.int64))
    _save(folder / "bytes.npy", sizes)
    rows.select(kept).select_columns(["name", "text"]).save_to_disk(folder / "documents")
    return SplitMetadata(len(kept), sum(lengths), int(sizes.sum()), dropped, digest.hexdigest())


def _save(file: Path, numbers: np.ndarray) -> None:
    content = io.BytesIO()  # NumPy's own error about a full disk carries no error number
    np.save(content, numbers)
    file.write_bytes(content.getvalue())


def _encode(batch: dict, tokenizer: tokenizers.Tokenizer, alone: bool) -> dict:
    if alone:  # one of many processes: the library's own threads would only be in their way
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
    tokens = [np.concatenate([[tokenizer.bos], tokenizer.encode(text)]) for text in batch["text"]]
    return {"bytes": [len(text.encode()) for text in batch["text"]], "tokens": tokens}


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _log_table(table: "rich.table.Table") -> None:
    from rich.console import Console

    console = Console(width=140, file=io.StringIO())
    console.print(table)
    log.info("\n" + console.file.getvalue())

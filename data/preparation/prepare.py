"""A tokenized corpus for given settings: opened if the cache has it, written once if not.

The folder (../corpus/corpus.py describes it) is written under another name, flushed to disk, and renamed when it is
complete. So a crash leaves no partial corpus. If a file changes later, its size or its sha256 shows it, and the corpus
is written again.
"""

import hashlib
import io
import json
import logging
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from ..corpus import Corpus
from ..corpus.joined import JoinedCorpus
from ..errors import CorpusError
from ..sources import Mixture, Source, TokenShards
from ..sources.bad_documents import describe_bad
from ..sources.base import Paths
from ..sources.mixture import NO_NAME, named
from ..tokenizers import Saved, Tokenizer
from . import corpus_writer, shard_index
from .cache_errors import cache_errors

if TYPE_CHECKING:
    import rich.table

log = logging.getLogger(__name__)

FORMAT = 1  # to be raised if the same settings would produce other files


def prepare(
    source: Source, path: Paths, tokenizer: Tokenizer, minimum_tokens: int, cache: Path, on_bad_document: str
) -> Corpus:
    """Returns the corpus of these settings, which it writes below `cache` if none is there. Safe in several processes.

    A saved tokenizer also opens the corpus on which it was trained. So a run that is opened with its own tokenizer.json
    tokenizes nothing again.

    Documents that were skipped or repaired (`on_bad_document`) are logged each time, also of a corpus from the cache.

    Raises:
        CorpusError: the settings give no corpus, or `cache` cannot be written.
    """
    if isinstance(source, Mixture) and source.token_files:
        return _joined(source, path, tokenizer, minimum_tokens, cache, on_bad_document)
    corpus = _opened_or_written(source, path, tokenizer, minimum_tokens, cache, on_bad_document)
    corpus.tokenizer.origin = tokenizer.origin  # instead of a path in the cache
    if corpus.skipped:
        log.warning(f"corpus {corpus.fingerprint[:12]}: {describe_bad(corpus.skipped)}")
    return corpus


def _joined(
    source: Mixture, path: Paths, tokenizer: Tokenizer, minimum_tokens: int, cache: Path, on_bad_document: str
) -> JoinedCorpus:
    """Returns the corpus of a mixture with token files, of which each part has its own folder in `cache`."""
    source.check_settings(path, on_bad_document)
    source.use_tokenizer(tokenizer)
    settings = tokenizer, minimum_tokens, cache, on_bad_document
    parts = {
        mixed.name: named(mixed.name, prepare, mixed.source, mixed.path, *settings) for mixed in source.token_files
    }
    if source.texts is not None:
        parts[NO_NAME] = prepare(source.texts, None, *settings)
    return JoinedCorpus(parts)


def _opened_or_written(
    source: Source, path: Paths, tokenizer: Tokenizer, minimum_tokens: int, cache: Path, on_bad_document: str
) -> Corpus:
    from filelock import FileLock

    source.check_settings(path, on_bad_document)
    source.use_tokenizer(tokenizer)
    made_from = {
        "format": FORMAT,
        "source": source.identity(path, Path(cache)),
        "tokenizer": tokenizer.identity(),
        "minimum_tokens": minimum_tokens,
    }
    if source.skips and on_bad_document != "error":
        made_from["on_bad_document"] = on_bad_document
    if isinstance(tokenizer, Saved):  # earlier versions wrote corpora without this check of every document
        made_from["tokenizer"] = {**made_from["tokenizer"], "round_trip": True}
    made_from = json.loads(json.dumps(made_from))  # tuples become lists, as in metadata.json
    fingerprint = hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()[:32]
    folder = Path(cache) / fingerprint
    if corpus := _open(folder) or _open_trained_for(tokenizer, made_from, folder.parent):
        return corpus
    with cache_errors(folder.parent):
        folder.parent.mkdir(parents=True, exist_ok=True)
    with cache_errors(folder.parent), FileLock(folder.with_suffix(".lock")):  # released when its process dies
        if corpus := _open(folder):  # another process wrote it while this one waited
            return corpus
        for leftover in (folder, *folder.parent.glob(f"{fingerprint}.part[0-9]*")):  # the latter of earlier versions
            shutil.rmtree(leftover, ignore_errors=True)
        partial = folder.with_suffix(".partial")
        partial.mkdir(exist_ok=True)  # a preparation that was killed leaves what it had finished
        try:
            if isinstance(source, TokenShards):
                shard_index.write(partial, fingerprint, made_from, source, path, tokenizer, minimum_tokens)
            else:
                corpus_writer.write(
                    partial, fingerprint, made_from, source, path, tokenizer, minimum_tokens, on_bad_document
                )
            os.rename(partial, folder)
        except Exception:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        corpus_writer.flush(folder.parent)
    corpus = Corpus(folder)
    _log_table(corpus.report())
    return corpus


def _open(folder: Path) -> Corpus | None:
    if not folder.exists():
        return None
    try:
        return Corpus(folder)
    except CorpusError as error:
        log.warning(f"{error}: the corpus is prepared again")
        return None


def _open_trained_for(tokenizer: Tokenizer, made_from: dict, cache: Path) -> Corpus | None:
    """The corpus of the same documents on which this saved tokenizer was trained: its tokens are the same."""
    if not isinstance(tokenizer, Saved):
        return None
    for file in sorted(cache.glob("*/metadata.json")):
        try:
            metadata = json.loads(file.read_text())
            same_documents = metadata["made_from"] | {"tokenizer": made_from["tokenizer"]} == made_from
            # That of a saved tokenizer has another fingerprint only if its documents were not checked.
            trained = metadata["made_from"]["tokenizer"].get("tokenizer") != "saved"
            complete = metadata["fingerprint"] == file.parent.name  # otherwise a process is still writing it
        except (OSError, ValueError, KeyError):
            continue
        corpus = _open(file.parent) if same_documents and trained and complete else None
        if corpus and corpus.tokenizer.identity() == tokenizer.identity():
            return corpus
    return None


def _log_table(table: "rich.table.Table") -> None:
    from rich.console import Console

    console = Console(width=140, file=io.StringIO())
    console.print(table)
    log.info("\n" + console.file.getvalue())

"""Writes a corpus of token files that other programs prepared: the places of documents. Tokens are not copied."""

import hashlib
import logging
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np

from ..corpus.split import SplitMetadata
from ..corpus.token_files import Shard, Stream, read_shard
from ..errors import CorpusError
from ..sources import SPLITS, TokenShards
from ..sources.base import Paths
from ..sources.files import UNDIVIDED
from ..sources.splits import split_of
from ..tokenizers import Tokenizer
from .arrays import save_array
from .corpus_writer import SHORTEST, finish, write_sizes

log = logging.getLogger(__name__)

CHUNK = 1 << 22  # tokens that are scanned at once
SHOWN_TOKENS = 50_000_000  # tokens from which a progress bar is shown


def write(
    folder: Path,
    fingerprint: str,
    made_from: dict,
    source: TokenShards,
    path: Paths,
    tokenizer: Tokenizer,
    minimum_tokens: int,
) -> None:
    """Writes metadata.json, tokenizer.json and the folders of the splits (`ShardedSplit`) to `folder`, which exists and
    is empty.

    Raises:
        CorpusError: a file cannot be read, or has tokens beyond the vocabulary, or a split has no document.
    """
    started = time.perf_counter()
    digests = {file: digest for _, file, digest in made_from["source"]["files"]}
    tokenizer.save(folder / "tokenizer.json")
    splits, shards, scanned = {}, {}, {}
    for split, files in source.find(path).items():
        key = tuple(files)
        if key not in scanned:  # validation may serve as test
            read = [read_shard(file, source.dtype) for file in files]
            scanned[key] = read, _scan(read, tokenizer, path)
        read, documents = scanned[key]
        divided = _divided(read, documents) if split == UNDIVIDED else {split: documents}
        for name, chosen in divided.items():
            content = hashlib.sha256("".join(digests[shard.path] for shard in read).encode())
            if split == UNDIVIDED:
                content.update(f"{name} {chosen.shape[1]}".encode())
            shards[name] = [asdict(shard) for shard in read]
            splits[name] = asdict(_write_split(folder / name, chosen, minimum_tokens, content.hexdigest(), path))
    made = {
        "fingerprint": fingerprint,
        "made_from": made_from,
        "dtype": source.dtype,
        "splits": {name: splits[name] for name in SPLITS},
        "shards": shards,
    }
    finish(folder, made)
    log.info(f"documents of {len(digests)} token files found in {time.perf_counter() - started:.1f} s")


def _scan(shards: Sequence[Shard], tokenizer: Tokenizer, path: Paths) -> np.ndarray:
    """Returns int64 `[3, documents]`: the index of each document's first token in the stream, its number of tokens,
    and the bytes of all tokens but the first."""
    from datasets.utils import tqdm

    token_bytes, total = tokenizer.token_bytes, sum(shard.tokens for shard in shards)
    starts, bytes_before, counted, place = [], [], 0, 0
    with tqdm(total=total, desc="find documents", unit="tokens", unit_scale=True, disable=total < SHOWN_TOKENS) as bar:
        for shard in shards:
            tokens = shard.open()
            for begin in range(0, len(tokens), CHUNK):
                chunk = tokens[begin : begin + CHUNK]
                _check_tokens(chunk, shard, tokenizer)
                found = np.flatnonzero(chunk == tokenizer.bos)
                if not place and (not len(found) or found[0]):
                    found = np.concatenate([[0], found])  # the stream begins without a separator
                    counted -= int(token_bytes[chunk[0]])
                before = np.cumsum(token_bytes[chunk]) - token_bytes[chunk]
                starts.append(found + place)
                bytes_before.append(before[found] + counted)
                counted += int(token_bytes[chunk].sum())
                place += len(chunk)
                bar.update(len(chunk))
    if not place:
        raise CorpusError(f"data.path={path}: must hold tokens, and {shards[0].path} has none")
    start, before = np.concatenate(starts), np.concatenate(bytes_before)
    before[0] = 0
    if len(start) == 1:
        log.warning(f"data.path={path}: token {tokenizer.bos}, which separates documents, is not in {shards[0].path}")
    return np.stack([start, np.diff(start, append=place), np.diff(before, append=counted)])


def _check_tokens(chunk: np.ndarray, shard: Shard, tokenizer: Tokenizer) -> None:
    smallest, largest = int(chunk.min()), int(chunk.max())
    if smallest < 0 or largest >= tokenizer.vocabulary:
        wrong = smallest if smallest < 0 else largest
        raise CorpusError(
            f"{tokenizer.origin}: must be the one that wrote {shard.path}: token {wrong} is beyond its vocabulary of"
            f" {tokenizer.vocabulary}, or its dtype is not {shard.dtype} (data.source.dtype)"
        )
    if shard.dtype == "uint16" and len(chunk) >= 64 and np.count_nonzero(chunk[1::2]) < len(chunk) / 8:
        raise CorpusError(
            f"data.source.dtype=uint16: must be the one of {shard.path}, in which every second number is 0: uint32"
        )


def _divided(shards: Sequence[Shard], documents: np.ndarray) -> dict[str, np.ndarray]:
    """Returns the columns of `documents`, an array of `_scan`, of each split: a hash of a document's tokens decides."""
    stream = Stream(shards)
    sides = np.array(
        [
            SPLITS.index(split_of(hashlib.sha256(stream.read(start, start + length).astype("<u4")).hexdigest()))
            for start, length, _ in documents.T.tolist()
        ]
    )
    return {name: documents[:, sides == number] for number, name in enumerate(SPLITS)}


def _write_split(folder: Path, documents: np.ndarray, minimum_tokens: int, content: str, path: Paths) -> SplitMetadata:
    """Writes the folder of one split. `documents`: those of the split, an array of `_scan`."""
    starts, lengths, sizes = documents
    shortest = max(minimum_tokens, SHORTEST)
    kept = lengths >= shortest
    if not kept.any():
        raise CorpusError(
            f"data.path={path}: must hold documents of every split, and the {folder.name} split has none of"
            f" {shortest} tokens (data.minimum_tokens); add documents, or name the files train, val and test"
        )
    folder.mkdir()
    save_array(folder / "starts.npy", starts[kept])
    return write_sizes(folder, lengths, sizes, shortest, content)

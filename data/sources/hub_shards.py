"""The files of a hub dataset as shards of a stream: listed without a download, and read from any row on."""

import io
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path, PurePath
from typing import TYPE_CHECKING

from ..errors import CorpusError
from .bad_documents import BadDocuments
from .file_rows import checked, decompressed, kind_of, unreadable
from .files import name_of
from .tables import json_lines, parquet

if TYPE_CHECKING:
    from datasets import DatasetBuilder

READERS = {".jsonl": json_lines, ".json": json_lines, ".parquet": parquet}
"""Readers by the ending of the file, which .gz, .zst, .xz or .bz2 may follow. The hub's .json files hold lines, too."""

READ_AT_ONCE = 1 << 20  # bytes

SAMPLED_SHARDS = 16
"""The most shards in which the first documents of a dataset are read."""


@dataclass(frozen=True)
class ShardFile:
    """A file of a dataset.

    name: below the dataset's folder. url: as fsspec opens it. size: bytes.
    content: the hub's hash of its content; None for a local file.
    """

    name: str
    url: str
    size: int
    content: str | None

    @property
    def identity(self) -> list[str | int | None]:
        return [self.name, self.size, self.content]


def list_shards(builder: "DatasetBuilder", path: str) -> dict[str, list[ShardFile]]:
    """Returns the files of each split of a dataset, in the order of their names.

    Raises:
        CorpusError: the dataset has no files, or a file has another format than those of READERS.
    """
    from fsspec.core import url_to_fs

    splits, root = {}, Path(path).expanduser().resolve()
    for split, urls in (builder.config.data_files or {}).items():
        shards = splits[str(split)] = []
        for url in sorted(urls):
            system, place = url_to_fs(url)
            about = system.info(place)
            # Without the commit: the same files in a later one are the same documents.
            name = re.sub(r"^.*?@[^/]+/", "", url) if "://" in url else name_of(Path(url), root)
            shards.append(ShardFile(name, url, about["size"], about.get("blob_id")))
            if kind_of(PurePath(name), READERS) is None:
                raise CorpusError(
                    f"data.path={path}: must hold {', '.join(READERS)} files (also compressed) for"
                    f" data.source.streaming=true, and holds {name}"
                )
    if not splits:
        raise CorpusError(f"data.path={path}: must be a dataset of files for data.source.streaming=true")
    return splits


def read_shard(shard: ShardFile, start: int, text_column: str, bad: BadDocuments) -> Iterator[tuple[int, str | None]]:
    """Yields the number and the text of each row from row `start` on; None for a text that `bad` skips. At no time is
    more than a row group or a line in memory.

    Raises:
        CorpusError: a row cannot be read and `bad` skips none, or the bytes of the file cannot be read.
    """
    from fsspec.core import url_to_fs

    name = PurePath(shard.name)
    kind = kind_of(name, READERS)
    system, place = url_to_fs(shard.url)
    try:
        with system.open(place, "rb") as opened:
            stream = opened if kind == ".parquet" else io.BufferedReader(opened, READ_AT_ONCE)
            rows = READERS[kind](decompressed(stream, name.suffix.lower()), shard.name, text_column, bad, start)
            for row, (where, value, fault) in enumerate(rows, start):
                yield row, checked(value, fault, f"{shard.name}, {where}", f"a string in the field {text_column},", bad)
    except unreadable() as error:
        reason = " ".join(str(error).split())
        raise CorpusError(
            f"data.path={bad.path}: must hold a whole {kind} file in {shard.name}, which cannot be read: {reason}"
        ) from error


def first_documents(shards: Sequence[ShardFile], text_column: str, bad: BadDocuments) -> Iterator[dict[str, str]]:
    """Yields the documents, with the keys `name` and `text`, of at most SAMPLED_SHARDS shards that are evenly spread:
    one document of each in turn, from their first ones on. Empty texts are left out."""
    count = min(len(shards), SAMPLED_SHARDS)
    chosen = [shards[number * len(shards) // count] for number in range(count)]
    readers = [_documents(shard, text_column, bad) for shard in chosen]
    while readers:
        for reader in list(readers):
            documents = list(islice(reader, 1))
            yield from documents
            if not documents:
                readers.remove(reader)


def _documents(shard: ShardFile, text_column: str, bad: BadDocuments) -> Iterator[dict[str, str]]:
    for row, text in read_shard(shard, 0, text_column, bad):
        if text:
            yield {"name": f"{shard.name}:{row}", "text": text}

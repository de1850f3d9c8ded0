"""Reads documents from one file: text, or a table of texts, compressed or not, or an archive of such files."""

import bz2
import gzip
import io
import logging
import lzma
import zlib
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any, BinaryIO, cast

from .archives import ARCHIVES, UNREADABLE, members
from .bad_documents import BadDocuments, fault_of_text, is_repairable
from .tables import READERS, fasta

if TYPE_CHECKING:
    from datasets import Dataset

log = logging.getLogger(__name__)

KINDS = (".txt", ".md", ".py", ".jsonl", ".parquet")
"""The extensions that were read before they could be chosen."""

CHARACTERS_AT_ONCE = 1 << 20  # Arrow takes less than 2 GB of strings in a batch
MOST_ROWS_AT_ONCE = 1000

COMPRESSED = (".gz", ".zst", ".xz", ".bz2")


def kind_of(file: PurePath, kinds: Collection[str]) -> str | None:
    """Returns the one of `kinds` that a file's ending names, in any case, compressed or not; None if it names none."""
    endings = [ending.lower() for ending in file.suffixes]
    if endings and endings[-1] in COMPRESSED:
        endings.pop()
    return endings[-1] if endings and endings[-1] in kinds else None


def shown(name: str) -> str:
    """Returns a file name as valid Unicode: bytes that are not UTF-8 become \\xff."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def read_rows(
    file: Path, name: str, kinds: Collection[str], text_column: str, bad: BadDocuments
) -> Iterator[dict[str, str]]:
    """Yields the documents of a file, each with the keys `name` and `text`: the file, the rows of a table, or the
    documents of each file in an archive.

    kinds: extensions of the files that are read, also in archives.

    Raises:
        CorpusError: a table has no column `text_column`, or a document cannot be read and `bad` skips none.
    """
    kind = kind_of(file, kinds)
    try:
        if kind not in ARCHIVES:
            with open(file, "rb") as stream:
                yield from _read(stream, file, name, kind, text_column, bad)
            return
        left_out = 0
        for member, stream in members(file, kind):
            inner = kind_of(PurePath(member), kinds)
            if inner is None or inner in ARCHIVES:
                left_out += 1
            else:
                yield from _read(stream, PurePath(member), f"{name}/{shown(member)}", inner, text_column, bad)
        if left_out:
            log.warning(f"{name}: {left_out} files in it are left out (read are {' '.join(kinds)})")
    except unreadable() as error:
        bad.add(name, f"unreadable bytes ({error})", f"a whole {kind} file")


def unreadable() -> tuple[type[Exception], ...]:
    """Returns the exceptions of a file system, the hub's included, of decompression, of archives and of pyarrow."""
    import pyarrow

    return OSError, EOFError, zlib.error, lzma.LZMAError, *UNREADABLE, pyarrow.ArrowException, connection_error()


def connection_error() -> type[Exception]:
    """Returns the exception of a connection to the hub that is lost. It is no OSError, and its library depends on the
    version of huggingface_hub, whose own error is derived from it."""
    from huggingface_hub.errors import HfHubHTTPError

    return HfHubHTTPError.__bases__[0]


def _read(
    compressed: BinaryIO, file: PurePath, name: str, kind: str | None, text_column: str, bad: BadDocuments
) -> Iterator[dict[str, str]]:
    stream = decompressed(compressed, file.suffix.lower())
    if kind not in READERS:
        text = checked(stream.read().decode("utf-8", "surrogateescape"), None, name, "a UTF-8 text", bad, replaces=True)
        if text is not None:
            yield {"name": name, "text": text}
        return
    accepted = "a sequence of DNA" if READERS[kind] is fasta else f"a string in the field {text_column},"
    for row, (place, value, fault) in enumerate(READERS[kind](stream, name, text_column, bad)):
        text = checked(value, fault, f"{name}, {place}", accepted, bad, replaces=True)
        if text is not None:
            yield {"name": f"{name}:{row}", "text": text}


def checked(
    value: Any, fault: str | None, place: str, accepted: str, bad: BadDocuments, replaces: bool = False
) -> str | None:
    """Returns a document's text, with U+FFFD where `bad` replaces bytes that are not UTF-8; None if it is skipped.

    replaces: whether the source accepts `data.on_bad_document=replace`.
    """
    if fault := fault or fault_of_text(value):
        repaired = bad.repair(place, value) if isinstance(value, str) else None
        if repaired is None:
            bad.add(place, fault, accepted, repairable=replaces and is_repairable(value))
        return repaired
    return value


def write_rows(rows: Iterable[dict[str, str]], file: Path) -> "Dataset":
    """Writes rows of `name` and `text` to an Arrow file and returns them, memory-mapped."""
    import pyarrow
    from datasets import Dataset

    schema = pyarrow.schema([("name", pyarrow.string()), ("text", pyarrow.string())])
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file, "wb") as stream, pyarrow.ipc.new_stream(stream, schema) as writer:
        for batch in _batches(rows):
            columns = [pyarrow.array([row[name] for row in batch], pyarrow.string()) for name in schema.names]
            writer.write_batch(pyarrow.RecordBatch.from_arrays(columns, schema=schema))
    return Dataset.from_file(str(file))


def _batches(rows: Iterable[dict[str, str]]) -> Iterator[list[dict[str, str]]]:
    batch, characters = [], 0
    for row in rows:
        batch.append(row)
        characters += len(row["text"])
        if characters >= CHARACTERS_AT_ONCE or len(batch) == MOST_ROWS_AT_ONCE:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def rows_at_once(rows: "Dataset") -> int:
    """Returns the number of rows of average size to read at once: about CHARACTERS_AT_ONCE bytes."""
    average = rows.data.nbytes / max(len(rows.data), 1)
    return int(min(max(CHARACTERS_AT_ONCE // max(average, 1), 1), MOST_ROWS_AT_ONCE))


def texts_of(rows: "Dataset") -> Iterator[str]:
    """Yields the texts of rows of `text`. It is faster than a loop over the rows, where they are short and many."""
    return _column_of(rows, "text")


def names_of(rows: "Dataset") -> Iterator[str]:
    """Yields the names of rows of `name`."""
    return _column_of(rows, "name")


def _column_of(rows: "Dataset", name: str) -> Iterator[str]:
    for table in rows.select_columns(name).with_format("arrow").iter(rows_at_once(rows)):
        yield from table.column(name).to_pylist()


def decompressed(stream: BinaryIO, ending: str) -> BinaryIO:
    """Returns the decompressed content of a file that ends in `ending`; the stream itself if it is not compressed."""
    if ending == ".zst":
        import pyarrow

        return io.BufferedReader(pyarrow.CompressedInputStream(pyarrow.PythonFile(stream), "zstd"))
    opened = {".gz": gzip.open, ".xz": lzma.open, ".bz2": bz2.open}.get(ending)
    return cast(BinaryIO, opened(stream, "rb")) if opened else stream

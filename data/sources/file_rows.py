"""Reads documents from one file: text, or a table of texts, compressed or not."""

import gzip
import io
import json
import zlib
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from ..errors import CorpusError
from .bad_documents import BadDocuments, fault_of_text

if TYPE_CHECKING:
    from datasets import Dataset

PLAIN_TEXT = (".txt", ".md", ".py")
TABLES = (".jsonl", ".parquet")
KINDS = (*PLAIN_TEXT, *TABLES)
COMPRESSED = (".gz", ".zst")

ROWS_AT_ONCE = 16  # Arrow takes less than 2 GB of strings in a batch


def kind_of(file: Path, kinds: tuple[str, ...] = KINDS) -> str | None:
    """Returns the one of `kinds` that a file's ending names, in any case, with or without .gz or .zst; None if none."""
    endings = [ending.lower() for ending in file.suffixes]
    if endings and endings[-1] in COMPRESSED:
        endings.pop()
    return endings[-1] if endings and endings[-1] in kinds else None


def shown(name: str) -> str:
    """Returns a file name as valid Unicode: bytes that are not UTF-8 become \\xff."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def read_rows(file: Path, name: str, text_column: str, bad: BadDocuments) -> Iterator[dict[str, str]]:
    """Yields the documents of a file, each with the keys `name` and `text`: the file, or the rows of a table.

    Raises:
        CorpusError: a table has no column `text_column`, or a document cannot be read and `bad` skips none.
    """
    import pyarrow

    read = {".jsonl": _json_lines, ".parquet": _parquet}.get(kind_of(file) or "")
    # The exceptions of a file system, of gzip, and of pyarrow
    unreadable = OSError, EOFError, zlib.error, pyarrow.ArrowException
    if read is None:
        try:
            with _open(file) as stream:
                yield {"name": name, "text": stream.read().decode("utf-8")}
        except UnicodeDecodeError as error:
            found = f"the byte 0x{error.object[error.start]:02x} at {error.start}, which is not UTF-8"
            bad.add(name, found, "a UTF-8 text")
        except unreadable as error:
            bad.add(name, f"unreadable bytes ({error})", f"a whole {kind_of(file)} file")
        return
    accepted = f"a string as {text_column}"
    try:
        for row, (place, value, fault) in enumerate(read(file, name, text_column, bad)):
            if fault := fault or fault_of_text(value):
                bad.add(f"{name}, {place}", fault, accepted)
            else:
                yield {"name": f"{name}:{row}", "text": value}
    except unreadable as error:
        bad.add(name, f"unreadable bytes ({error})", f"a whole {kind_of(file)} file")


def write_rows(rows: Iterable[dict[str, str]], file: Path) -> "Dataset":
    """Writes rows of `name` and `text` to an Arrow file and returns them, memory-mapped."""
    import pyarrow
    from datasets import Dataset

    schema = pyarrow.schema([("name", pyarrow.string()), ("text", pyarrow.string())])
    remaining = iter(rows)
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file, "wb") as stream, pyarrow.ipc.new_stream(stream, schema) as writer:
        while batch := list(islice(remaining, ROWS_AT_ONCE)):
            writer.write_batch(pyarrow.RecordBatch.from_pylist(batch, schema))
    return Dataset.from_file(str(file))


def missing_column(text_column: str, name: str, columns: Iterable[str]) -> CorpusError:
    return CorpusError(f"data.source.text_column={text_column}: must be a column of {name}: {', '.join(columns)}")


def _open(file: Path) -> BinaryIO:
    """Opens a file for reading, decompressed."""
    ending = file.suffix.lower()
    if ending == ".gz":
        return gzip.open(file, "rb")
    stream = open(file, "rb")  # noqa: SIM115  (the caller closes it)
    if ending == ".zst":
        import pyarrow

        return io.BufferedReader(pyarrow.CompressedInputStream(pyarrow.PythonFile(stream), "zstd"))
    return stream


def _json_lines(file: Path, name: str, text_column: str, bad: BadDocuments) -> Iterator[tuple[str, Any, str | None]]:
    """Yields the place of each line, its value in `text_column`, and what is wrong with the line."""
    with_column, columns = False, None
    with _open(file) as stream:
        for number, line in enumerate(stream, 1):
            line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line  # a byte-order mark
            if not line.strip():
                continue
            place = f"line {number}"
            try:
                row = json.loads(line.decode("utf-8"))
            except (ValueError, RecursionError) as error:
                yield place, None, f"no whole JSON object ({error})"
                continue
            if not isinstance(row, dict):
                yield place, None, f"{fault_of_text(row) or 'a string'} instead of an object"
            elif text_column in row:
                with_column = True
                yield place, row[text_column], None
            else:
                columns = columns or list(row)
                if bad.policy == "error" and not with_column:
                    break
                yield place, None, f"an object without it, with {', '.join(row)}"
    if columns and not with_column:
        raise missing_column(text_column, name, columns)


def _parquet(file: Path, name: str, text_column: str, bad: BadDocuments) -> Iterator[tuple[str, Any, str | None]]:
    """As `_json_lines`, for rows."""
    from pyarrow.parquet import ParquetFile

    with _open(file) as stream:
        table = ParquetFile(stream if file.suffix.lower() not in COMPRESSED else io.BytesIO(stream.read()))
        if text_column not in table.schema_arrow.names:
            raise missing_column(text_column, name, table.schema_arrow.names)
        row = 0
        for batch in table.iter_batches(ROWS_AT_ONCE, columns=[text_column]):
            for value in batch.column(text_column):
                try:
                    yield f"row {row}", value.as_py(), None
                except UnicodeDecodeError as error:
                    yield f"row {row}", None, f"text that is not UTF-8 ({error.reason})"
                row += 1

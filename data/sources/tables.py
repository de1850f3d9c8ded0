"""Reads the texts of a table: .jsonl, .json, .csv, .tsv, .parquet, .arrow, or the sequences of a FASTA file.

Each reader takes an open binary file, its name, the column with the text, and the policy for bad documents. It yields
the place of each row, its value in that column, and what is wrong with the row (None if it can be read). Raises
CorpusError if the table has no such column. A byte of text that is not UTF-8 becomes a lone surrogate
(`surrogateescape`).
"""

import csv
import io
import json
import logging
import re
from bisect import bisect
from collections.abc import Callable, Iterable, Iterator
from itertools import accumulate, islice
from typing import TYPE_CHECKING, Any, BinaryIO

from ..errors import CorpusError
from .bad_documents import BadDocuments, fault_of_text

if TYPE_CHECKING:
    import pyarrow

log = logging.getLogger(__name__)

Row = tuple[str, Any, str | None]

ROWS_AT_ONCE = 16  # Arrow takes less than 2 GB of strings in a batch
LONGEST_FIELD = 1 << 31  # bytes; csv refuses fields of more than 128 kB by default


def missing_column(text_column: str, name: str, columns: Iterable[str]) -> CorpusError:
    return CorpusError(f"data.source.text_column={text_column}: must be a column of {name}: {', '.join(columns)}")


def json_lines(stream: BinaryIO, name: str, text_column: str, bad: BadDocuments, start: int = 0) -> Iterator[Row]:
    """Reads an object a line. `start`: rows that are left out at the beginning, without parsing them."""
    lines = ((number, line) for number, line in enumerate(stream, 1) if line.strip())
    rows = ((f"line {number}", line) for number, line in islice(lines, start, None))
    yield from _objects(rows, name, text_column, bad, start)


def json_file(stream: BinaryIO, name: str, text_column: str, bad: BadDocuments) -> Iterator[Row]:
    """Reads one object, or a list of objects."""
    try:
        content = stream.read()
        encoding = json.detect_encoding(content)  # utf-8 with or without a byte-order mark, utf-16 or utf-32
        content = json.loads(content.decode(encoding, "surrogateescape" if "8" in encoding else "surrogatepass"))
    except (ValueError, RecursionError) as error:
        yield "its whole text", None, f"no JSON ({error})"
        return
    items = content if isinstance(content, list) else [content]
    yield from _objects(((f"item {number}", item) for number, item in enumerate(items)), name, text_column, bad)


def _objects(
    rows: Iterable[tuple[str, Any]], name: str, text_column: str, bad: BadDocuments, before: int = 0
) -> Iterator[Row]:
    """Yields rows of JSON objects. `rows`: places, with objects or the bytes of objects. `before`: rows before them,
    which had the column if there are any."""
    with_column, columns = before > 0, None
    for place, row in rows:
        if isinstance(row, bytes):
            try:
                row = json.loads(row.removeprefix(b"\xef\xbb\xbf").decode("utf-8", "surrogateescape"))
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


def comma_separated(
    stream: BinaryIO, name: str, text_column: str, bad: BadDocuments, delimiter: str = ","
) -> Iterator[Row]:
    """Reads a CSV file whose first line names the columns."""
    csv.field_size_limit(LONGEST_FIELD)
    text = io.TextIOWrapper(stream, "utf-8-sig", "surrogateescape", newline="")
    rows = csv.reader(text, delimiter=delimiter, strict=True)
    try:
        columns = next(rows, [])
        if text_column not in columns:
            raise missing_column(text_column, name, columns)
        column = columns.index(text_column)
        for row in rows:
            if len(row) == len(columns):
                yield f"line {rows.line_num}", row[column], None
            elif row:
                yield f"line {rows.line_num}", None, f"{len(row)} fields instead of {len(columns)}"
    except csv.Error as error:  # what follows cannot be told apart into rows
        yield f"line {rows.line_num + 1}", None, f"no row of a table ({error})"


def tab_separated(stream: BinaryIO, name: str, text_column: str, bad: BadDocuments) -> Iterator[Row]:
    yield from comma_separated(stream, name, text_column, bad, delimiter="\t")


def parquet(stream: BinaryIO, name: str, text_column: str, bad: BadDocuments, start: int = 0) -> Iterator[Row]:
    """`start`: rows that are left out at the beginning. Their row groups are not read."""
    from pyarrow.parquet import ParquetFile

    table = ParquetFile(stream if stream.seekable() else io.BytesIO(stream.read()))
    if text_column not in table.schema_arrow.names:
        raise missing_column(text_column, name, table.schema_arrow.names)
    ends = list(accumulate(table.metadata.row_group(group).num_rows for group in range(table.num_row_groups)))
    first = bisect(ends, start)  # the row group with the row
    before = ends[first - 1] if first else 0
    batches = table.iter_batches(ROWS_AT_ONCE, row_groups=range(first, len(ends)), columns=[text_column])
    rows = values((batch.column(text_column) for batch in batches), before)
    yield from islice(rows, start - before, None)


def arrow(stream: BinaryIO, name: str, text_column: str, bad: BadDocuments) -> Iterator[Row]:
    """Reads Arrow's file format and its stream format, which `datasets` writes."""
    from pyarrow import ipc

    is_file = stream.read(6) == b"ARROW1"
    stream.seek(0)
    if is_file:
        table = ipc.open_file(stream)
        batches: Iterable[pyarrow.RecordBatch] = map(table.get_batch, range(table.num_record_batches))
    else:
        table = batches = ipc.open_stream(stream)
    if text_column not in table.schema.names:
        raise missing_column(text_column, name, table.schema.names)
    yield from values(batch.column(text_column) for batch in batches)


def fasta(stream: BinaryIO, name: str, text_column: str, bad: BadDocuments) -> Iterator[Row]:
    """Reads DNA. A row is a run of A, C, G and T in capital letters; small letters (repeats) become capital ones.

    N and the other letters of IUPAC for an uncertain base, and gaps, end a run and are in none. So no model is trained
    or scored on a base that is unknown, and none reads across it. The log counts them.
    """
    left_out = letters = 0
    for record, (header, lines) in enumerate(_records(stream)):
        place = f"record {record} ({header.decode('utf-8', 'backslashreplace')[:40]})"
        sequence = b"".join(lines).translate(None, b" \t\r\n").upper()
        if other := re.search(rb"[^ACGTNRYSWKMBDHV.*-]", sequence):
            yield place, None, f"the letter {other[0].decode('latin-1')!r}, which stands for no base of DNA"
            continue
        letters += len(sequence)
        left_out += len(sequence)
        for run in re.finditer(rb"[ACGT]+", sequence):
            left_out -= len(run[0])
            yield f"{place} at {run.start()}", run[0].decode("ascii"), None
    if left_out:
        log.warning(f"{name}: {left_out:,} of {letters:,} letters are N or another uncertain base, and are left out")


def _records(stream: BinaryIO) -> Iterator[tuple[bytes, list[bytes]]]:
    """Yields the header and the lines of each record. Lines before the first header are a record without one."""
    header, lines = b"", []
    for line in stream:
        if line.startswith(b">"):
            if lines:
                yield header, lines
            header, lines = line[1:].strip(), []
        else:
            lines.append(line)
    if lines:
        yield header, lines


def values(batches: "Iterable[pyarrow.Array]", row: int = 0) -> Iterator[Row]:
    """Yields a row for each value of a column, which is read in batches. Rows are numbered across all batches.

    row: the number of the first one.
    """
    for batch in batches:
        for value in batch:
            try:
                text = value.as_py()
            except UnicodeDecodeError:
                text = value.as_buffer().to_pybytes().decode("utf-8", "surrogateescape")
            yield f"row {row}", text, None
            row += 1


READERS: dict[str, Callable[[BinaryIO, str, str, BadDocuments], Iterator[Row]]] = {
    ".jsonl": json_lines,
    ".json": json_file,
    ".csv": comma_separated,
    ".tsv": tab_separated,
    ".parquet": parquet,
    ".arrow": arrow,
    ".fa": fasta,
    ".fna": fasta,
    ".fasta": fasta,
}
"""Readers by the ending of the file; a file of any other ending is one text."""

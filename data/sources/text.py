"""Text of documents, read from files and from the rows of tables."""

import logging
from pathlib import Path
from typing import TYPE_CHECKING

from .bad_documents import BadDocuments, fault_of_text
from .tables import missing_column, values

if TYPE_CHECKING:
    import pyarrow
    from datasets import Dataset

log = logging.getLogger(__name__)


def read_utf8(file: Path) -> str | None:
    """Returns the text of a file with its line endings as they are; None if it is not UTF-8."""
    try:
        return file.read_bytes().decode("utf-8")
    except UnicodeDecodeError:
        return None


def warn_not_utf8(files: list[str]) -> None:
    """Logs the names of files that were left out."""
    if files:
        log.warning(f"{len(files)} files are not UTF-8 and are left out: {', '.join(files)}")


def name_and_text(rows: "Dataset", text_column: str, name: str, bad: BadDocuments) -> "Dataset":
    """Returns rows with the columns `text` and `name`; each row's name is `name` and the row's number.

    Raises:
        CorpusError: the rows have no column `text_column`, or one without text and `bad` skips none.
    """
    from datasets import Value

    if text_column not in rows.column_names:
        raise missing_column(text_column, name, rows.column_names)
    rows = rows.select_columns(text_column)
    if text_column != "text":
        rows = rows.rename_column(text_column, "text")
    rows = rows.add_column("name", [f"{name}:{row}" for row in range(len(rows))])
    is_text = rows.features["text"] in (Value("string"), Value("large_string"))
    column = rows.with_format("arrow")[:].column("text")
    if not is_text or column.null_count or not _is_utf8(column):
        kept = []
        for row, (place, value, _) in enumerate(values(column.chunks)):
            if fault := fault_of_text(value):
                bad.add(f"{name}, {place}", fault, f"a string in the field {text_column},")
            else:
                kept.append(row)
        rows = rows.select(kept)
    return rows if rows.features["text"] == Value("string") else rows.cast_column("text", Value("string"))


def _is_utf8(column: "pyarrow.ChunkedArray") -> bool:
    import pyarrow

    try:
        column.validate(full=True)
    except pyarrow.ArrowInvalid:
        return False
    return True

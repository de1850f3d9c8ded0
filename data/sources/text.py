"""Text of documents, read from files and from the rows of tables."""

import logging
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import CorpusError

if TYPE_CHECKING:
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


def name_and_text(rows: "Dataset", text_column: str, name: str) -> "Dataset":
    """Returns rows with the columns `text` and `name`; each row's name is `name` and the row's number.

    Raises:
        CorpusError: the rows have no column `text_column`.
    """
    if text_column not in rows.column_names:
        columns = ", ".join(rows.column_names)
        raise CorpusError(f"data.source.text_column={text_column}: must be a column of {name}: {columns}")
    rows = rows.select_columns(text_column)
    if text_column != "text":
        rows = rows.rename_column(text_column, "text")
    return rows.add_column("name", [f"{name}:{row}" for row in range(len(rows))])

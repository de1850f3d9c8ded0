"""Series of numbers as documents."""

import csv
import io
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import numpy as np
from pydantic import Field

from ..digests import FILE as DIGESTS
from ..digests import digests_of
from ..errors import CorpusError
from ..tokenizers.bins import Bins
from .bad_documents import BadDocuments
from .base import Extensions, Name, Paths, Source
from .file_rows import decompressed, kind_of, unreadable, write_rows
from .file_search import find_files
from .files import name_of, root_of
from .splits import SPLITS
from .tables import LONGEST_FIELD

if TYPE_CHECKING:
    from datasets import Dataset

    from ..tokenizers import Tokenizer

log = logging.getLogger(__name__)

READER = 1  # to be raised if other documents would be made of the same files


@dataclass(frozen=True)
class Series:
    """A column of numbers.

    values: float64 `[rows]`.
    ends: for each split, the row after its last one. The splits follow one another: training, validation, test.
    """

    name: str
    values: np.ndarray
    ends: dict[str, int]

    def part(self, split: str) -> slice:
        """Returns the rows of a split."""
        before = SPLITS[: SPLITS.index(split)]
        return slice(self.ends[before[-1]] if before else 0, self.ends[split])

    @cached_property
    def scale(self) -> float:
        """The mean absolute value of the training part; 1 if that is 0. The values of all parts are divided by it, and
        then quantized (mean scaling, Ansari et al. 2024). Validation and test values do not change it."""
        return float(np.abs(self.values[self.part("train")]).mean()) or 1.0

    @cached_property
    def mean_and_deviation(self) -> tuple[float, float]:
        """The mean and the standard deviation (of the population; 1 if it is 0) of the training part."""
        train = self.values[self.part("train")]
        return float(train.mean()), float(train.std()) or 1.0

    def standardize(self, values: np.ndarray) -> np.ndarray:
        """Returns (values - mean) / deviation."""
        mean, deviation = self.mean_and_deviation
        return (values - mean) / deviation


class TimeSeries(Source):
    """Columns of numbers of .csv files whose first line names the columns. A series is a document in each split.

    Each series is divided in time, in the order of the rows: the first part is for training, the next for validation,
    the last for test. The text of a part has one character a value (data/tokenizers/bins.py), which stands for the
    value divided by the series' scale (`Series.scale`).

    extensions: of the files that are read, also when compressed; in a .tsv, tabs separate the columns.
    time_column: the column with the times, which is not a series; None if there is none.
    parts: rows of the training, validation and test part, or their shares of all rows. Rows after them are not read.
    """

    several_paths = True

    def __init__(
        self,
        extensions: Extensions,
        time_column: Name | None,
        parts: Annotated[tuple[Annotated[float, Field(gt=0)], ...], Field(min_length=3, max_length=3)],
    ):
        in_rows = all(part == int(part) for part in parts)
        if not in_rows and sum(parts) > 1 + 1e-9:
            raise CorpusError(
                f"data.source.parts={list(parts)}: must be three numbers of rows, or three shares that add up to at"
                " most 1"
            )
        self.extensions = tuple(extensions)
        self.time_column = time_column
        self.parts = tuple(map(int, parts)) if in_rows else tuple(parts)
        self.tokenizer: Bins | None = None

    def check(self, path: Paths) -> None:
        if not path:
            raise CorpusError("data.path=null: must be a folder, a file or a glob, for example ETTh1.csv")
        find_files(path, self.extensions)

    def use_tokenizer(self, tokenizer: "Tokenizer") -> None:
        if not isinstance(tokenizer, Bins):
            raise CorpusError(f"{tokenizer.origin}: must be data/tokenizer=bins for numbers")
        self.tokenizer = tokenizer

    def identity(self, path: Paths, cache: Path | None = None) -> dict:
        files = find_files(path, self.extensions).files
        digests = digests_of(files, cache and cache / DIGESTS)
        names = [name_of(file, root_of(path)) for file in files]
        settings = {"time_column": self.time_column, "parts": self.parts}
        return {"source": "timeseries", "reader": READER, **settings, "files": [*zip(names, digests, strict=True)]}

    def load(self, path: Paths, arrow_cache: Path, bad: BadDocuments) -> "dict[str, Dataset]":
        found = find_files(path, self.extensions)
        if left_out := found.describe_left_out():
            log.warning(f"data.path={path}: {left_out}")
        tokenizer, rows = self.tokenizer, {split: [] for split in SPLITS}
        assert tokenizer is not None, "use_tokenizer comes before load"
        beyond = total = 0
        for series in self.read(path, bad):
            scaled = series.values / series.scale
            for split in SPLITS:
                part = scaled[series.part(split)]
                rows[split].append({"name": series.name, "text": tokenizer.decode(tokenizer.tokens_of(part))})
                beyond += int((np.abs(part) > tokenizer.limit).sum())
                total += len(part)
        log.info(f"data.path={path}: {len(rows['train'])} series, {total:,} values")
        if beyond:
            log.warning(
                f"data.path={path}: {beyond:,} of {total:,} values are beyond {tokenizer.limit:g} times the mean"
                " absolute value of their training part (data.tokenizer.limit), and are in the outermost bins"
            )
        return {split: write_rows(found, arrow_cache / f"{split}.rows") for split, found in rows.items()}

    def load_evaluated(self, path: Paths, arrow_cache: Path, bad: BadDocuments, split: str) -> "list[Dataset]":
        return [self.load(path, arrow_cache, bad)[split]]

    def read(self, path: Paths, bad: BadDocuments) -> Iterator[Series]:
        """Yields the series of all files.

        Raises:
            CorpusError: a file has no column `time_column`, no names of columns, or fewer rows than `parts`; or a value
                is not a finite number and the policy of `bad` is not `skip`, which leaves out the whole series.
        """
        for file in find_files(path, self.extensions).files:
            yield from self._read_file(file, name_of(file, root_of(path)), bad)

    def _read_file(self, file: Path, name: str, bad: BadDocuments) -> Iterator[Series]:
        csv.field_size_limit(LONGEST_FIELD)
        lines, rows = [], []
        try:
            with open(file, "rb") as compressed:
                text = io.TextIOWrapper(decompressed(compressed, file.suffix.lower()), "utf-8-sig", newline="")
                delimiter = "\t" if kind_of(file, self.extensions) == ".tsv" else ","
                reader = csv.reader(text, delimiter=delimiter, strict=True)
                columns = next(reader, [])
                _check_delimiter(columns, delimiter, name)
                for row in reader:
                    if len(row) != len(columns):
                        found = f"{len(row)} fields instead of {len(columns)}"
                        bad.add(f"{name}, line {reader.line_num}", found, "a value of each column")
                        return
                    lines.append(reader.line_num)
                    rows.append(row)
        except (*unreadable(), csv.Error, UnicodeDecodeError) as error:
            bad.add(name, f"no table ({error})", "a whole file of comma-separated values")
            return
        self._check_columns(columns, name)
        ends = self._ends(len(rows), name)
        for column, cells in zip(columns, zip(*rows, strict=True), strict=True):
            if column == self.time_column:
                _warn_of_order(name, column, cells, lines)
                continue
            values = np.array([_number(cell) for cell in cells])
            wrong = np.flatnonzero(~np.isfinite(values))
            if len(wrong):
                place = f"{name}, line {lines[wrong[0]]}, column {column}"
                accepted = f"a finite number in every row (data.source.time_column={self.time_column} alone has none)"
                bad.add(place, repr(cells[wrong[0]]), accepted)
            else:
                yield Series(f"{name}:{column}", values, ends)

    def _check_columns(self, columns: list[str], name: str) -> None:
        if columns and all(np.isfinite(_number(column)) for column in columns):
            raise CorpusError(f"data.path={name}: must have the names of its columns in its first line")
        if self.time_column is not None and self.time_column not in columns:
            raise CorpusError(
                f"data.source.time_column={self.time_column}: must be a column of {name} ({', '.join(columns)}),"
                " or null"
            )

    def _ends(self, rows: int, name: str) -> dict[str, int]:
        cumulative = np.cumsum(self.parts)
        in_rows = isinstance(self.parts[0], int)
        ends = [int(each) if in_rows else round(float(each) * rows) for each in cumulative]
        if ends[-1] > rows or min(np.diff([0, *ends])) < 1:
            raise CorpusError(
                f"data.source.parts={list(self.parts)}: must give each part a row of {name}, which has {rows}"
            )
        if ends[-1] < rows:
            log.info(f"{name}: {rows - ends[-1]:,} of {rows:,} rows come after the test part and are not read")
        return dict(zip(SPLITS, ends, strict=True))


def _check_delimiter(columns: Sequence[str], delimiter: str, name: str) -> None:
    """Raises CorpusError if the first line of a file is one column and has another delimiter."""
    if len(columns) == 1 and any(other in columns[0] for other in ",;\t"):
        accepted = "commas (tabs in a .tsv)" if delimiter == "," else "tabs (commas in a .csv)"
        raise CorpusError(
            f"data.path={name}: must have {accepted} between its columns and a point in 1.5, and its first line is"
            f" {columns[0]!r}"
        )


def _warn_of_order(name: str, column: str, cells: Sequence[str], lines: Sequence[int]) -> None:
    """Warns if times decrease: the parts of a series are divided in the order of the rows. Times that are neither
    numbers nor of ISO 8601 are not compared."""
    times = np.array([_time(cell) for cell in cells])
    earlier = np.flatnonzero(np.diff(times) < 0) + 1
    if len(earlier):
        log.warning(
            f"{name}: {len(earlier):,} of {len(times):,} rows have an earlier {column} than the row before, the first"
            f" in line {lines[earlier[0]]}: data.source.parts divides series in the order of the rows, not of the times"
        )


def _time(cell: str) -> float:
    """Returns a number, or the seconds of a date and time in the form of ISO 8601; nan for other text."""
    try:
        return float(cell)
    except ValueError:
        pass
    try:
        time = datetime.fromisoformat(cell)
    except ValueError:
        return float("nan")
    return (time if time.tzinfo else time.replace(tzinfo=UTC)).timestamp()


def _number(cell: str) -> float:
    try:
        return float(cell)
    except ValueError:
        return float("nan")

"""Series of numbers: parts in time, a scale of the training part alone, and values that are no numbers."""

import gzip

import numpy as np
import pytest

from data import CorpusError, InMemoryDocuments, prepare
from data.sources import BadDocuments, TimeSeries
from data.tokenizers import BPE, Bins, Bytes, Saved, load
from tests.data.sources.rows import STRICT

BINS = Bins(9, 4.0)  # centers -4, -3, ..., 4


def source(time_column: str | None = "date", parts=(4, 2, 2)) -> TimeSeries:
    made = TimeSeries((".csv",), time_column, parts)
    made.use_tokenizer(BINS)
    return made


@pytest.fixture
def table(tmp_path):
    file = tmp_path / "power.csv"
    rows = [(2, 10), (-2, 10), (2, -30), (-2, 10), (4, 15), (0, 0), (1000, -15), (-6, 1)]
    lines = [f"2020-01-01 {hour:02d}:00,{one},{two}\n" for hour, (one, two) in enumerate(rows)]
    file.write_text("date,one,two\n" + "".join(lines) + "2020-01-02 00:00,7,7\n")
    return file


def numbers(splits, split: str) -> list[list[float]]:
    return [BINS.numbers_of(BINS.encode(text)).tolist() for text in splits[split]["text"]]


def test_each_part_is_scaled_by_the_mean_magnitude_in_training(table, tmp_path, caplog):
    splits = source().load(str(table), tmp_path / "arrow", STRICT)
    assert {tuple(rows["name"]) for rows in splits.values()} == {("power.csv:one", "power.csv:two")}
    assert numbers(splits, "train") == [[1, -1, 1, -1], [1, 1, -2, 1]]  # by 2 and by 15, to the nearest center
    assert numbers(splits, "validation") == [[2, 0], [1, 0]]
    assert numbers(splits, "test") == [[4, -3], [-1, 0]]
    assert "1 of 16 values are beyond 4 times" in caplog.text


def test_later_values_change_nothing_before_them(table, tmp_path):
    before = source().load(str(table), tmp_path / "before", STRICT)
    table.write_text(table.read_text().replace("1000,-15", "3,5000"))
    after = source().load(str(table), tmp_path / "after", STRICT)
    for split in ("train", "validation"):
        assert before[split]["text"][:] == after[split]["text"][:]
    assert before["test"]["text"][:] != after["test"]["text"][:]
    assert source().identity(str(table)) != source(parts=(4, 2, 1)).identity(str(table))


def test_shares_and_compressed_files(table):
    compressed = table.with_suffix(".csv.gz")
    compressed.write_bytes(gzip.compress(table.read_bytes().replace(b"date", b"hour")))
    one, two = source("hour", parts=(0.5, 0.25, 0.25)).read(str(compressed), STRICT)
    assert one.ends == {"train": 4, "validation": 7, "test": 9} and two.name == "power.csv.gz:two"
    assert one.values[one.part("validation")].tolist() == [4, 0, 1000]
    assert one.standardize(np.array([2, -2, 6])).tolist() == [1, -1, 3]  # the training part has mean 0, deviation 2


def test_a_value_that_is_no_number_is_one_line_or_its_series_is_skipped(table, tmp_path, caplog):
    table.write_text(table.read_text().replace("10:00", "").replace("-2,10", "-2,NA"))
    with pytest.raises(
        CorpusError,
        match=r"a finite number in every row .* in power\.csv, line 3, column two, and holds 'NA'; data\.on_bad",
    ):
        source().load(str(table), tmp_path / "arrow", STRICT)
    bad = BadDocuments("skip", str(table))
    assert [series.name for series in source().read(str(table), bad)] == ["power.csv:one"]
    assert bad.count == 1
    table.write_text(table.read_text() + "2020-01-02 01:00,7\n")
    with pytest.raises(CorpusError, match=r"line 11, and holds 2 fields instead of 3"):
        list(source().read(str(table), STRICT))


@pytest.mark.parametrize(
    ("suffix", "text", "must"),
    [
        (".csv", "date;one\n2020;1,5\n", "must have commas .* between .* first line is 'date;one'"),
        (".csv", "date\tone\n2020\t1\n", "must have commas"),
        (".tsv", "date,one\n2020,1\n", "must have tabs"),
    ],
)
def test_another_delimiter_is_named(suffix, text, must, tmp_path):
    file = tmp_path / f"power{suffix}"
    file.write_text(text)
    with pytest.raises(CorpusError, match=must):
        list(TimeSeries((suffix,), "date", (4, 2, 2)).read(str(file), STRICT))


@pytest.mark.parametrize(
    ("times", "earlier"),
    [
        (["2020-01-01 00:00", "2020-01-01 01:00", "2020-01-01 01:00", "2020-01-02"], 0),
        (["2020-10-25T02:30+02:00", "2020-10-25T02:00+01:00", "2020-10-25T03:00+01:00", "2020-10-25T04:00+01:00"], 0),
        (["2020-01-04", "2020-01-03", "2020-01-02", "2020-01-01"], 3),
        (["9", "10", "11", "2"], 1),
        (["31.12.2020", "01.01.2021", "02.01.2021", "03.01.2021"], 0),
    ],
)
def test_rows_in_another_order_than_their_times_are_counted(tmp_path, caplog, times, earlier):
    (tmp_path / "a.csv").write_text("date,one\n" + "".join(f"{time},1\n" for time in times))
    list(source(parts=(2, 1, 1)).read(str(tmp_path), STRICT))
    assert [record.getMessage().partition(" rows ")[0] for record in caplog.records] == (
        [f"a.csv: {earlier} of 4"] if earlier else []
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"time_column": "time"},
            r"^data\.source\.time_column=time: must be a column of power\.csv \(date, one, two\)",
        ),
        (
            {"parts": (8, 1, 1)},
            r"^data\.source\.parts=\[8, 1, 1\]: must give each part a row of power\.csv, which has 9",
        ),
        ({"parts": (0.98, 0.01, 0.01)}, r"^data\.source\.parts=\[0\.98, 0\.01, 0\.01\]: must give each part"),
        ({"parts": (0.5, 0.5, 0.5)}, r"^data\.source\.parts=\[0\.5, 0\.5, 0\.5\]: must be .* shares that add up"),
    ],
)
def test_wrong_settings_are_named(table, settings, message):
    with pytest.raises(CorpusError, match=message):
        list(source(**settings).read(str(table), STRICT))


def test_a_file_without_names_of_columns(tmp_path):
    (tmp_path / "a.csv").write_text("1,2\n3,4\n")
    with pytest.raises(CorpusError, match=r"a\.csv: must have the names of its columns"):
        list(source(None).read(str(tmp_path), STRICT))


def test_a_corpus_of_series_opens_with_the_tokenizer_that_it_saved(table, tmp_path):
    corpus = prepare(source(), str(table), BINS, 0, tmp_path / "cache", "error")
    assert corpus.splits["train"].tokens(1).tolist() == [9, 5, 5, 2, 5]  # bos, and the bins
    assert corpus.splits["train"].total_bytes == corpus.tokenizer.token_bytes[corpus.splits["train"].flat].sum()
    saved = Saved(str(corpus.folder))
    assert isinstance(saved, Bins) and saved.identity() == corpus.tokenizer.identity() == BINS.identity()
    again = prepare(source(), str(table), saved, 0, tmp_path / "cache", "error")
    assert again.fingerprint == corpus.fingerprint
    documents = InMemoryDocuments.load(TimeSeries((".csv",), "date", (4, 2, 2)), str(table), saved, "error", "test")
    assert len(documents) == 2  # of the other parts, no value is scored
    assert all(documents.tokens(n).tolist() == corpus.splits["test"].tokens(n).tolist() for n in (0, 1))


@pytest.mark.parametrize(("choice", "tokenizer"), [("bytes", Bytes()), ("bpe", BPE(300))])
def test_series_need_bins(table, tmp_path, choice, tokenizer):
    with pytest.raises(CorpusError, match=rf"^data/tokenizer={choice}: must be data/tokenizer=bins"):
        prepare(source(), str(table), tokenizer, 0, tmp_path / "cache", "error")
    assert not (tmp_path / "cache").exists()


def test_bins_read_no_other_text(tmp_path):
    BINS.save(tmp_path / "tokenizer.json")
    for text in ("a", "\u4e00\u4e09", "\U0001f600"):
        with pytest.raises(
            CorpusError, match=rf"^data\.tokenizer\.path={tmp_path}/tokenizer\.json: must be another tokenizer for text"
        ):
            load(tmp_path / "tokenizer.json").encode(text)


def test_bins_have_centers_at_equal_distances():
    bins = Bins(21, 2.5)
    assert bins.numbers_of(np.array([0, 10, 20])) == pytest.approx([-2.5, 0, 2.5])
    values = np.random.default_rng(1).uniform(-2.5, 2.5, 500)
    centers = np.linspace(-2.5, 2.5, 21)
    assert bins.tokens_of(values).tolist() == np.abs(values[:, None] - centers).argmin(1).tolist()
    assert bins.tokens_of(np.array([-np.inf, 9.0])).tolist() == [0, 20]
    assert bins.encode(bins.decode([bins.bos, 0, 20])).tolist() == [0, 20]

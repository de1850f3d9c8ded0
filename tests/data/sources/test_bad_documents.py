"""A document that cannot be read ends the command with an error of one line, or is skipped, counted and reported."""

import gzip
import json
import logging
import os

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from data import Code, CorpusError, Files, Hub, InMemoryDocuments, prepare
from data.sources import BadDocuments
from data.tokenizers import Bytes
from tests.data.sources.rows import STRICT, by_name

GOOD = '{"text": "good"}\n'


def jsonl(line: str | bytes) -> bytes:
    return (GOOD * 2).encode() + (line.encode() if isinstance(line, str) else line)


def parquet(folder, values, kind=None) -> bytes:
    file = folder / "made.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": pyarrow.array(values, kind)}), file)
    content = file.read_bytes()
    file.unlink()
    return content


BAD = {
    "a null": ("a.jsonl", jsonl('{"text": null}'), "a.jsonl, line 3", "null", 2),
    "a boolean": ("a.jsonl", jsonl('{"text": true}'), "a.jsonl, line 3", "and holds true", 2),
    "an integer": ("a.jsonl", jsonl('{"text": 7}'), "a.jsonl, line 3", "the number 7", 2),
    "a list": ("a.jsonl", jsonl('{"text": ["a"]}'), "a.jsonl, line 3", "a list", 2),
    "no object": ("a.jsonl", jsonl('["text"]'), "a.jsonl, line 3", "a list", 2),
    "no column": ("a.jsonl", jsonl('{"body": "x"}'), "a.jsonl, line 3", "body", 2),
    "a cut line": ("a.jsonl", jsonl('{"text": "cut'), "a.jsonl, line 3", "JSON", 2),
    "half a character": ("a.jsonl", jsonl('{"text": "\\ud800"}'), "a.jsonl, line 3", "ud800", 2),
    "a line of other bytes": ("a.jsonl", jsonl(b'{"text": "\xff"}'), "a.jsonl, line 3", "0xff", 2),
    "a deep line": ("a.jsonl", jsonl("[" * 100_000), "a.jsonl, line 3", "JSON", 2),
    "a text of other bytes": ("a.txt", b"abc\xff", "a.txt", "0xff", 0),
    "a cut gzip of lines": ("a.jsonl.gz", gzip.compress(jsonl("") * 9)[:-9], "a.jsonl.gz", "unreadable", None),
    "no gzip": ("a.txt.gz", b"text", "a.txt.gz", "unreadable", 0),
    "no zstd": ("a.txt.zst", b"text", "a.txt.zst", "unreadable", 0),
    "no parquet": ("a.parquet", b"PAR1 and no more", "a.parquet", "unreadable", 0),
}
BAD_TABLES = {
    "a null": (["good", None], None, "row 1", "null", 1),
    "integers": ([1, 2], None, "row 0", "the number 1", 0),
    "lists": ([["a"]], None, "row 0", "a list", 0),
    "binary": ([b"a"], None, "row 0", "binary", 0),
}


@pytest.fixture
def place(tmp_path):
    folder = tmp_path / "place"
    folder.mkdir()
    (folder / "good.txt").write_text("good")
    return folder


def check(place, scratch, where, found, kept):
    """The first bad document is an error of one line; with `skip` the `kept` others are read, and it is counted."""
    with pytest.raises(CorpusError) as error:
        Files("text").load(str(place), scratch / "strict", BadDocuments("error", str(place)))
    message = str(error.value)
    assert (
        message.startswith(f"data.path={place}: must hold ") and f"{where}, and holds " in message and found in message
    )
    assert "data.on_bad_document=skip" in message and "\n" not in message

    bad = BadDocuments("skip", str(place))
    documents = by_name(Files("text").load(str(place), scratch / "skip", bad))
    assert bad.count >= 1 and bad.examples[0].startswith(f"{where}: ") and set(documents.values()) == {"good"}
    assert kept is None or len(documents) == kept + 1


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_document_is_one_line_or_is_skipped(place, tmp_path, kind):
    name, content, where, found, kept = BAD[kind]
    (place / name).write_bytes(content)
    check(place, tmp_path, where, found, kept)


@pytest.mark.parametrize("kind", BAD_TABLES)
def test_a_bad_row_of_a_table_is_one_line_or_is_skipped(place, tmp_path, kind):
    values, arrow_type, where, found, kept = BAD_TABLES[kind]
    (place / "a.parquet").write_bytes(parquet(tmp_path, values, arrow_type))
    check(place, tmp_path, f"a.parquet, {where}", found, kept)


def test_a_cut_parquet_file_is_one_line(place, tmp_path):
    content = parquet(tmp_path, ["good"] * 100)
    (place / "a.parquet").write_bytes(content[: len(content) // 2])
    check(place, tmp_path, "a.parquet", "unreadable", 0)


def test_tables_of_several_kinds_of_strings_and_an_empty_one(place, tmp_path):
    (place / "empty.jsonl").write_text("")
    (place / "blank.jsonl").write_text(f"\n{GOOD}\n")
    (place / "mark.jsonl").write_bytes(b"\xef\xbb\xbf" + GOOD.encode())
    (place / "a.parquet").write_bytes(parquet(tmp_path, ["a"], pyarrow.string()))
    (place / "b.parquet").write_bytes(parquet(tmp_path, ["b"], pyarrow.large_string()))
    assert by_name(Files("text").load(str(place), tmp_path / "arrow", STRICT)) == {
        "good.txt": "good",
        "a.parquet:0": "a",
        "b.parquet:0": "b",
        "blank.jsonl:0": "good",
        "mark.jsonl:0": "good",
    }


def test_rows_keep_their_numbers_where_one_is_skipped(place, tmp_path):
    (place / "a.jsonl").write_text(GOOD + "broken\n" + GOOD)
    documents = by_name(Files("text").load(str(place), tmp_path / "arrow", BadDocuments("skip", None)))
    assert set(documents) == {"good.txt", "a.jsonl:0", "a.jsonl:2"}


def test_a_file_name_that_is_not_utf8_is_read(place, tmp_path):
    with open(os.fsencode(place) + b"/odd\xff.txt", "w") as file:
        file.write("odd")
    corpus_rows = by_name(Files("text").load(str(place), tmp_path / "arrow", STRICT))
    assert corpus_rows == {"good.txt": "good", "odd\\xff.txt": "odd"}
    assert json.dumps(Files("text").identity(str(place)))


def test_skipped_documents_are_told_again_by_the_cached_corpus(books, tmp_path, caplog):
    (books / "train" / "bad.txt").write_bytes(b"\xff")
    (books / "valid" / "bad.txt").write_bytes(b"\xff")

    def corpus(policy):
        caplog.clear()
        return prepare(Files("text"), str(books), Bytes(), 0, tmp_path / "cache", policy)

    with pytest.raises(CorpusError, match=r": must hold .* train/bad\.txt"):
        corpus("error")
    first = corpus("skip")
    assert first.skipped["documents"] == 2 and len(first.splits["train"]) == 12
    assert "2 documents cannot be read" in caplog.text and "train/bad.txt" in caplog.text
    caplog.set_level(logging.WARNING)
    assert corpus("skip").skipped == first.skipped and "2 documents cannot be read" in caplog.text
    with pytest.raises(CorpusError, match=r": must hold .* train/bad\.txt"):  # the cached corpus is another one's
        corpus("error")


def test_a_policy_is_one_of_three():
    with pytest.raises(CorpusError, match=r"^data\.on_bad_document=ignore: must be error, skip or replace$"):
        BadDocuments("ignore", None)


def not_utf8(folder, values: list[bytes]) -> bytes:
    """A parquet file of strings that its writer did not check."""
    strings = pyarrow.array(values, pyarrow.binary()).view(pyarrow.string())
    return parquet(folder, strings)


def test_bytes_that_are_not_utf8_are_replaced_and_counted(place, tmp_path, caplog):
    files = {
        "a.txt": b"caf\xe9 \xef\xbb\xbf",
        "b.jsonl": b'{"text": "\xff", "id": "\xff"}\n{"text": "good", "id": "\xff"}\n{"text": "\\ud800"}\n',
        "c.csv": b"text\nna\xefve\ngood\n",
        "d.parquet": not_utf8(tmp_path, [b"good", b"\xe2\x82"]),
    }
    for name, content in files.items():
        (place / name).write_bytes(content)
    source = Files("text", (".txt", ".jsonl", ".csv", ".parquet"))
    bad = BadDocuments("replace", str(place))
    assert by_name(source.load(str(place), tmp_path / "arrow", bad)) == {
        "good.txt": "good",
        "a.txt": "caf\ufffd \ufeff",
        "b.jsonl:0": "\ufffd",
        "b.jsonl:1": "good",
        "b.jsonl:2": "\ufffd",
        "c.csv:0": "na\ufffdve",
        "c.csv:1": "good",
        "d.parquet:0": "good",
        "d.parquet:1": "\ufffd\ufffd",
    }
    assert (
        bad.summary()["documents"] == 5 and bad.examples[0] == "a.txt: the byte 0xe9 at character 3, which is not UTF-8"
    )
    documents = InMemoryDocuments.load(source, str(place), Bytes(), "replace", "test")
    assert documents.left_out == {"unreadable": 0, "empty": 0} and "5 documents have U+FFFD" in caplog.text
    (place / "e.jsonl").write_text('{"text": null}')
    with pytest.raises(CorpusError, match=r": must hold a string in the field text, in e\.jsonl, line 1, and .* null"):
        source.load(str(place), tmp_path / "arrow2", BadDocuments("replace", str(place)))


@pytest.mark.parametrize("content", ["A café.".encode("utf-16"), b"PK\x03\x04\x14\x00\xff"], ids=["UTF-16", "binary"])
def test_a_file_that_is_no_text_in_bytes_is_not_repaired(content, tmp_path):
    (tmp_path / "a.txt").write_bytes(content)
    for policy in ("error", "replace"):
        with pytest.raises(CorpusError, match=r"in a\.txt, and holds NULs .*=skip skips such documents$"):
            Files("text", (".txt",)).load(str(tmp_path), tmp_path / "arrow", BadDocuments(policy, str(tmp_path)))
    (tmp_path / "a.txt").write_bytes(b"caf\xe9")
    with pytest.raises(CorpusError, match=r"the byte 0xe9 .* skips such documents, and replace writes U"):
        Files("text", (".txt",)).load(str(tmp_path), tmp_path / "arrow", STRICT)


def test_a_source_that_replaces_no_bytes_refuses_the_policy(place, tmp_path):
    for source in (Hub(None, "train", None, "text"), Code((".py",), 1, False)):
        with pytest.raises(CorpusError, match=r"^data\.on_bad_document=replace: must be error or skip, "):
            prepare(source, str(place), Bytes(), 0, tmp_path / "cache", "replace")
    assert not (tmp_path / "cache").exists()


def test_the_documents_of_an_evaluation_are_counted(place, caplog):
    (place / "null.jsonl").write_text('{"text": null}\n' + GOOD)
    (place / "empty.txt").write_text("")
    with pytest.raises(CorpusError, match=r": must hold .* null\.jsonl, line 1"):
        InMemoryDocuments.load(Files("text"), str(place), Bytes(), "error", "test")
    documents = InMemoryDocuments.load(Files("text"), str(place), Bytes(), "skip", "test")
    assert sorted(documents.names) == ["good.txt", "null.jsonl:1"]
    assert documents.left_out == {"unreadable": 1, "empty": 1}
    assert "1 document cannot be read and is skipped" in caplog.text and "1 of 3 documents are empty" in caplog.text


def test_a_validation_split_that_serves_as_test_is_evaluated_once(books):
    documents = InMemoryDocuments.load(Files("text"), str(books), Bytes(), "error", "test")
    assert len(documents) == len(set(documents.names)) == 12 + 3


@pytest.mark.parametrize("kind", ["line", "null", "bytes", "large"])
def test_a_local_dataset_with_a_bad_line(tmp_path, kind):
    folder = tmp_path / "dataset"
    folder.mkdir()
    hub = Hub(config=None, split="train", revision=None, text_column="text")
    if kind == "large":
        values = pyarrow.array(["good"] * 3, pyarrow.large_string())
        pyarrow.parquet.write_table(pyarrow.table({"text": values}), folder / "train.parquet")
        splits = hub.load(str(folder), tmp_path / "arrow", STRICT)
        assert sum(map(len, splits.values())) == 3
        assert all(rows.features["text"] == datasets.Value("string") for rows in splits.values())
        return
    if kind == "bytes":
        (folder / "train.parquet").write_bytes(not_utf8(tmp_path, [b"good"] * 3 + [b"\xff"]))
    else:
        (folder / "train.jsonl").write_text(GOOD * 3 + ('{"text": "cut' if kind == "line" else '{"text": null}\n'))
    where = "train.jsonl, line 4" if kind == "line" else "row 3"
    with pytest.raises(CorpusError, match=rf"^data\.path={folder}: .*{where}.* skip") as error:
        hub.load(str(folder), tmp_path / "arrow", BadDocuments("error", str(folder)))
    assert "\n" not in str(error.value)
    if kind != "line":
        bad = BadDocuments("skip", str(folder))
        assert sum(map(len, hub.load(str(folder), tmp_path / "arrow", bad).values())) == 3 and bad.count == 1

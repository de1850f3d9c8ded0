"""Files of every ending are read; whatever is left out is counted; links are followed once."""

import gzip
import logging

import pyarrow
import pytest

from data import Files
from data.sources.splits import split_of
from tests.data.sources.rows import STRICT, by_name


def load(path, scratch):
    return Files("text").load(str(path), scratch / "arrow", STRICT)


def write_zst(file, content: bytes):
    with pyarrow.CompressedOutputStream(str(file), "zstd") as stream:
        stream.write(content)


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "a.txt").write_text("a")
    return folder


def test_endings_in_capitals_and_compressed_files(folder, tmp_path):
    (folder / "B.TXT").write_text("b")
    (folder / "c.Md.gz").write_bytes(gzip.compress(b"c\r\n"))
    write_zst(folder / "d.v2.py.zst", b"d")
    (folder / "e.JSONL.GZ").write_bytes(gzip.compress(b'{"text": "e0"}\n') + gzip.compress(b'{"text": "e1"}\n'))
    write_zst(folder / "f.jsonl.zst", b'{"text": "f"}\n')
    pyarrow.parquet.write_table(pyarrow.table({"text": ["g"]}), folder / "g.PARQUET")
    (folder / "h.parquet.gz").write_bytes(gzip.compress((folder / "g.PARQUET").read_bytes()))
    assert by_name(load(folder, tmp_path)) == {
        "a.txt": "a",
        "B.TXT": "b",
        "c.Md.gz": "c\r\n",
        "d.v2.py.zst": "d",
        "e.JSONL.GZ:0": "e0",
        "e.JSONL.GZ:1": "e1",
        "f.jsonl.zst:0": "f",
        "g.PARQUET:0": "g",
        "h.parquet.gz:0": "g",
    }


def test_what_is_left_out_is_counted_once(folder, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    for name in ("b.json", "c.JSON", "d.rst", "LICENSE", "e.tar.gz", "f.txt.bak", ".hidden.txt"):
        (folder / name).write_text("left out")
    for hidden in (".git", ".ipynb_checkpoints"):
        (folder / hidden).mkdir()
        (folder / hidden / "copy.txt").write_text("left out")
    (folder / "gone.txt").symlink_to(folder / "missing.txt")
    Files("text").check(str(folder))
    Files("text").identity(str(folder))
    assert not caplog.messages
    assert set(by_name(load(folder, tmp_path))) == {"a.txt"}
    (message,) = (message for message in caplog.messages if "left out" in message)
    for count in ("2 .json", "1 .rst", "1 .gz", "1 .bak", "1 without an ending", "1 broken links", "3 hidden"):
        assert count in message


def test_a_glob_counts_what_it_leaves_out(folder, tmp_path, caplog):
    (folder / "b.rst").write_text("left out")
    (folder / "c.txt").mkdir()
    assert set(by_name(load(folder / "*", tmp_path))) == {"a.txt"}
    assert "1 .rst" in caplog.text


def test_a_hidden_folder_is_read_by_its_own_name(tmp_path):
    (tmp_path / ".notes").mkdir()
    (tmp_path / ".notes" / "a.txt").write_text("a")
    assert set(by_name(load(tmp_path / ".notes", tmp_path))) == {"a.txt"}


def test_links_to_folders_are_followed_once(folder, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / "deep").mkdir(parents=True)
    (elsewhere / "deep" / "b.txt").write_text("b")
    (folder / "real").mkdir()
    (folder / "real" / "c.txt").write_text("c")
    (folder / "linked").symlink_to(elsewhere)
    (folder / "again").symlink_to(folder / "real")
    (folder / "real" / "loop").symlink_to(folder)
    (elsewhere / "self").symlink_to(elsewhere)
    (folder / "itself").symlink_to(folder / "itself")
    assert by_name(load(folder, tmp_path)) == {"a.txt": "a", "linked/deep/b.txt": "b", "real/c.txt": "c"}


def test_splits_may_be_links(books, tmp_path):
    links = tmp_path / "links"
    links.mkdir()
    for split in ("train", "valid"):
        (links / split).symlink_to(books / split)
    splits = load(links, tmp_path)
    assert {split: len(rows) for split, rows in splits.items()} == {"train": 12, "validation": 3, "test": 3}
    assert splits["train"]["name"][0] == "train/00.txt"


def test_copies_of_a_document_share_its_split(folder, tmp_path, caplog):
    for number in range(60):
        (folder / f"b{number:02}.txt").write_text("the same text")
        (folder / f"empty{number:02}.txt").write_text("")
    (folder / "z.jsonl").write_text('{"text": "the same text"}\n')
    splits = load(folder, tmp_path)
    (split,) = (split for split, rows in splits.items() if "the same text" in rows["text"][:])
    assert split == split_of("b00.txt")
    assert len({split_of(f"b{number:02}.txt") for number in range(60)}) > 1  # names alone would divide them
    assert "60 of 62 documents are copies" in caplog.text
    caplog.clear()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "a.txt").write_text("a")
    load(tmp_path / "other", tmp_path)
    assert "are copies" not in caplog.text

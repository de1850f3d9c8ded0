"""Extensions that the config lists: tables, compressed files, archives; and splits by folder."""

import bz2
import io
import json
import logging
import lzma
import tarfile
import zipfile

import pyarrow
import pytest

from data import CorpusError, Files
from data.sources import BadDocuments
from tests.data.sources.rows import STRICT, by_name

EVERY = (".txt", ".rst", ".json", ".csv", ".tsv", ".arrow", ".zip", ".tar", ".tgz")


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "folder").mkdir()
    return tmp_path / "folder"


def load(folder, tmp_path, extensions=EVERY, bad=STRICT, **settings):
    return Files("text", extensions=extensions, **settings).load(str(folder), tmp_path / "arrow", bad)


def arrow_stream(values, kind) -> bytes:
    table, content = pyarrow.table({"id": range(len(values)), "text": values}), io.BytesIO()
    with kind(content, table.schema) as writer:
        writer.write_table(table)
    return content.getvalue()


def zipped(files: dict[str, bytes]) -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, text in files.items():
            archive.writestr(name, text)
    return content.getvalue()


def tarred(files: dict[str, bytes], mode: str) -> bytes:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode=mode) as archive:
        for name, text in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(text)
            archive.addfile(member, io.BytesIO(text))
    return content.getvalue()


def test_every_extension(folder, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    long = "x" * 200_000  # more than the longest field that csv reads by default
    inside = {"deep/m.txt": b"m", "t.csv": b"text\nt0\n", ".hidden.txt": b"", "__MACOSX/m.txt": b"", "image.png": b""}
    files = {
        "a.rst": b"a",
        "b.txt.xz": lzma.compress(b"b\r\n"),
        "c.txt.bz2": bz2.compress(b"c"),
        "d.json": json.dumps([{"text": "d0"}, {"text": "d1", "id": 1}]).encode("utf-16"),
        "e.json": b'{"text": "e"}',
        "f.csv": b'\xef\xbb\xbfid,text\r\n1,"two\r\nlines, ""quoted"""\r\n\r\n2,' + long.encode() + b"\r\n",
        "g.tsv": "text\tid\ng é\t1\n".encode(),
        "h.arrow": arrow_stream(["h0", "h1"], pyarrow.ipc.new_stream),
        "i.arrow": arrow_stream(["i"], pyarrow.ipc.new_file),
        "j.zip": zipped(inside),
        "k.tar": tarred(inside, "w"),
        "l.tar.xz": tarred({"n.txt": b"n"}, "w:xz"),
        "m.tgz": tarred({"./o.txt.xz": lzma.compress(b"o")}, "w:gz"),
        "skipped.md": b"not listed",
    }
    for name, content in files.items():
        (folder / name).write_bytes(content)
    assert by_name(load(folder, tmp_path)) == {
        "a.rst": "a",
        "b.txt.xz": "b\r\n",
        "c.txt.bz2": "c",
        "d.json:0": "d0",
        "d.json:1": "d1",
        "e.json:0": "e",
        "f.csv:0": 'two\r\nlines, "quoted"',
        "f.csv:1": long,
        "g.tsv:0": "g é",
        "h.arrow:0": "h0",
        "h.arrow:1": "h1",
        "i.arrow:0": "i",
        "j.zip/deep/m.txt": "m",
        "j.zip/t.csv:0": "t0",
        "k.tar/deep/m.txt": "m",
        "k.tar/t.csv:0": "t0",
        "l.tar.xz/n.txt": "n",
        "m.tgz/./o.txt.xz": "o",
    }
    assert "1 .md" in caplog.text
    assert "j.zip: 1 files in it are left out" in caplog.text and "k.tar: 1 files in it" in caplog.text


BAD = {
    "json": ("a.json", b'{"text": "cut', "a.json, its whole text", "JSON", 0),
    "an item": ("a.json", b'[{"text": "good"}, {"text": 7}]', "a.json, item 1", "the number 7", 1),
    "a row that is too long": ("a.csv", b"text,id\ngood,1\na,b,c\ngood,2\n", "a.csv, line 3", "3 fields", 2),
    "an open quote": ("a.csv", b'text,id\ngood,1\n"a,2\n', "a.csv, line", "no row", 1),
    "another encoding": ("a.csv", b"text\ncaf\xe9\ngood\n", "a.csv, line 2", "0xe9", 1),
    "another encoding in json": ("a.json", b'[{"text": "caf\xe9"}, {"text": "good"}]', "a.json, item 0", "0xe9", 1),
    "no arrow": ("a.arrow", b"ARROW1 and no more", "a.arrow", "unreadable", 0),
    "no zip": ("a.zip", b"PK", "a.zip", "unreadable", 0),
    "a cut zip": ("a.zip", zipped({"a.txt": b"x" * 999})[:-40], "a.zip", "unreadable", 0),
    "a cut tar": ("a.tar.xz", tarred({"a.txt": b"x" * 99_999}, "w:xz")[:-40], "a.tar.xz", "unreadable", None),
    "a bad member": ("a.zip", zipped({"a.txt": b"\xff", "b.txt": b"good"}), "a.zip/a.txt", "0xff", 1),
    "no xz": ("a.txt.xz", b"text", "a.txt.xz", "unreadable", 0),
    "no bz2": ("a.txt.bz2", b"text", "a.txt.bz2", "unreadable", 0),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_file_is_one_line_or_is_skipped(folder, tmp_path, kind):
    name, content, where, found, kept = BAD[kind]
    (folder / name).write_bytes(content)
    (folder / "good.txt").write_text("good")
    with pytest.raises(CorpusError, match=rf"^data\.path={folder}: must hold .* in {where}.*{found}.*=skip[^\n]*$"):
        load(folder, tmp_path, bad=BadDocuments("error", str(folder)))
    bad = BadDocuments("skip", str(folder))
    documents = by_name(load(folder, tmp_path, bad=bad))
    assert bad.count == 1 and documents["good.txt"] == "good"
    assert kept is None or len(documents) == kept + 1


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", b"body,id\nx,1\n"),
        ("a.json", b'{"body": "x", "id": 1}'),
        ("a.zip", zipped({"a.csv": b"body,id\nx,1\n"})),
    ],
)
def test_a_missing_column_lists_the_columns(folder, tmp_path, name, content):
    (folder / name).write_bytes(content)
    with pytest.raises(CorpusError, match=r"^data\.source\.text_column=text: must be a column of a.* body, id$"):
        load(folder, tmp_path)


def test_identity_follows_the_extensions(folder):
    (folder / "a.zip").write_bytes(zipped({"a.txt": b"a", "a.rst": b"b"}))
    texts, others = (Files("text", extensions=(".zip", each)).identity(str(folder)) for each in (".txt", ".rst"))
    assert texts != others


def test_books_of_an_author_share_a_split(folder, tmp_path):
    for author in range(40):
        (folder / f"author{author:02}").mkdir()
        for title in "abc":
            (folder / f"author{author:02}" / f"{title}.txt").write_text(f"{author}{title} " * 100)
    (folder / "anonymous.txt").write_text("anonymous " * 30)
    splits = load(folder, tmp_path, extensions=(".txt",), split_by="folder")
    authors = {split: {name.partition("/")[0] for name in rows["name"]} for split, rows in splits.items()}
    assert set(authors) == {"train", "validation", "test"}
    assert sum(map(len, authors.values())) == 41
    sizes = {split: len(rows) for split, rows in splits.items()}
    assert sum(sizes.values()) == 121 and all(3 <= sizes[split] <= 6 for split in ("validation", "test"))

"""Files are whole documents, in the split of their folder, and none is left out silently."""

import json
import logging
import os
import shutil
from pathlib import Path

import pytest

from data import CorpusError, Files, Hub, prepare
from data.tokenizers import Bytes
from tests.data.sources.rows import STRICT, by_name

BOOKS = Path(__file__).parents[4] / "shared" / "data" / "books.tar.xz"


def test_files_of_every_kind(tmp_path):
    import datasets

    folder = tmp_path / "mixed"
    (folder / "deep").mkdir(parents=True)
    (folder / "a.txt").write_bytes(b"line\r\nline \xc3\xa9\n")
    (folder / "deep" / "b.md").write_text("# b")
    (folder / "c.py").write_text("c = 1")
    (folder / "ignored.csv").write_text("1,2")
    (folder / "d.jsonl").write_text("".join(json.dumps({"text": f"row {n}", "id": n}) + "\n" for n in range(3)))
    datasets.Dataset.from_dict({"text": ["p0", "p1"]}).to_parquet(str(folder / "e.parquet"))
    documents = by_name(Files("text").load(str(folder), tmp_path / "arrow", STRICT))
    assert documents == {
        "a.txt": "line\r\nline é\n",
        "deep/b.md": "# b",
        "c.py": "c = 1",
        "d.jsonl:0": "row 0",
        "d.jsonl:1": "row 1",
        "d.jsonl:2": "row 2",
        "e.parquet:0": "p0",
        "e.parquet:1": "p1",
    }


def test_files_by_glob_and_one_file(tmp_path):
    for name in ("a.txt", "b.txt", "c.md"):
        (tmp_path / name).write_text(name)
    assert set(by_name(Files("text").load(str(tmp_path / "*.txt"), tmp_path / "arrow", STRICT))) == {"a.txt", "b.txt"}
    assert set(by_name(Files("text").load(str(tmp_path / "c.md"), tmp_path / "arrow2", STRICT))) == {"c.md"}


def test_several_paths(tmp_path, monkeypatch):
    for name in ("books/a.txt", "books/deep/b.txt", "notes/a.md", "notes/c.txt", "other/d.txt"):
        (tmp_path / "all" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "all" / name).write_text(name)
    (tmp_path / "all" / "linked.txt").symlink_to("books/a.txt")
    shutil.copytree(tmp_path / "all", tmp_path / "copy", symlinks=True)
    source, identities = Files("text", split_by="content"), []
    for number, folder in enumerate(("all", "copy")):
        monkeypatch.chdir(tmp_path / folder)
        paths = ["books/", "notes/*.md", "./books/deep/b.txt", "linked.txt", str(tmp_path / folder / "books" / "*.txt")]
        assert by_name(source.load(paths, tmp_path / f"arrow{number}", STRICT)) == {
            "books/a.txt": "books/a.txt",
            "books/deep/b.txt": "books/deep/b.txt",
            "notes/a.md": "notes/a.md",
        }
        identities.append(source.identity(paths))
        assert source.identity(paths[:4][::-1]) == identities[-1]  # in any order
    assert identities[0] == identities[1]
    with pytest.raises(CorpusError, match=r"^data\.path=\S+/\*\.rst: must hold files that end in [^\n]*$"):
        source.check_settings(["books/", "*.rst"], "error")
    with pytest.raises(CorpusError, match=r"^data\.path=\[\]: must be "):
        source.check_settings([], "error")
    with pytest.raises(CorpusError, match=r"^data\.path=\['a', 'b'\]: must be one path, since "):
        Hub(None, None, None, "text").check_settings(["a", "b"], "error")


def test_splits_of_several_folders(books, tmp_path):
    second = tmp_path / "second"
    for split in ("train", "test"):
        (second / split).mkdir(parents=True)
        (second / split / "a.txt").write_text(f"of {split}")
    splits = Files("text").load([str(books), str(second)], tmp_path / "arrow", STRICT)
    assert {split: len(rows) for split, rows in splits.items()} == {"train": 13, "validation": 3, "test": 1}
    assert splits["test"]["name"][:] == ["second/test/a.txt"] and "books/train/00.txt" in splits["train"]["name"][:]
    with pytest.raises(CorpusError, match=r"must be folders that all have a folder train/.*/second/test has none$"):
        Files("text").check([str(books), str(second / "test")])


def test_folders_are_splits_and_validation_serves_as_test(books, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    (books / "stray.txt").write_text("left out")
    splits = Files("text").load(str(books), tmp_path / "arrow", STRICT)
    assert {split: len(rows) for split, rows in splits.items()} == {"train": 12, "validation": 3, "test": 3}
    assert "validation serves as test" in caplog.text
    assert "1 files outside" in caplog.text
    (books / "test").mkdir()
    (books / "test" / "t.txt").write_text("tested")
    assert Files("text").load(str(books), tmp_path / "arrow2", STRICT)["test"]["name"][:] == ["test/t.txt"]


def test_files_identity_follows_changes(books):
    source = Files("text")
    before = source.identity(str(books))
    assert source.identity(str(books)) == before != Files("body").identity(str(books))
    file = books / "train" / "00.txt"
    dates = file.stat().st_mtime_ns
    file.write_text(file.read_text()[::-1])
    os.utime(file, ns=(dates, dates))
    assert source.identity(str(books)) != before


def test_a_copy_elsewhere_with_other_dates_has_the_same_identity_and_splits(tmp_path):
    folder, copy = tmp_path / "one", tmp_path / "two"
    folder.mkdir()
    for number in range(40):
        (folder / f"{number:02}.txt").write_text(f"text {number}")
    shutil.copytree(folder, copy)
    os.utime(copy / "00.txt", ns=(1, 1))
    source = Files("text", split_by="content")
    assert source.identity(str(copy)) == source.identity(str(folder))
    before = source.load(str(folder), tmp_path / "arrow", STRICT)
    for file in copy.iterdir():
        file.rename(file.with_stem(f"renamed{file.stem}"))
    after = source.load(str(copy), tmp_path / "arrow2", STRICT)
    assert {split: rows["text"][:] for split, rows in after.items()} == {
        split: rows["text"][:] for split, rows in before.items()
    }
    assert len(before) > 1 and source.identity(str(copy)) != source.identity(str(folder))


@pytest.mark.parametrize(
    ("path", "message"),
    [
        (None, r"^data\.path=null: must be "),
        ("missing", r"^data\.path=\S+/missing: must be "),
        ("*.txt", r"^data\.path=\S+/\*\.txt: must .* \.txt \.md \.py \.jsonl \.parquet \(data\.source\.extensions\)$"),
        ("empty", r"^data\.path=\S+/empty: must .*\.txt"),
    ],
)
def test_files_that_are_not_there(tmp_path, path, message):
    (tmp_path / "empty").mkdir()
    with pytest.raises(CorpusError, match=message):
        Files("text").check(path and str(tmp_path / path))


def test_train_without_validation(books, tmp_path):
    import shutil

    shutil.rmtree(books / "valid")
    with pytest.raises(CorpusError, match=rf"^data\.path={books}: must .*validation"):
        Files("text").check(str(books))


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_missing_column_lists_the_columns(tmp_path, kind):
    import datasets

    rows = datasets.Dataset.from_dict({"body": ["x"], "id": [1]})
    (rows.to_json if kind == "jsonl" else rows.to_parquet)(str(tmp_path / f"a.{kind}"))
    with pytest.raises(CorpusError, match=r"^data\.source\.text_column=text: must .* body, id$"):
        Files("text").load(str(tmp_path / f"a.{kind}"), tmp_path / "arrow", STRICT)
    assert by_name(Files("body").load(str(tmp_path / f"a.{kind}"), tmp_path / "arrow", STRICT))[f"a.{kind}:0"] == "x"


@pytest.mark.skipif(not BOOKS.exists(), reason=f"{BOOKS} is not here")
def test_real_books_keep_their_splits(tmp_path):
    import tarfile

    with tarfile.open(BOOKS) as archive:
        taken = 0
        for member in archive:  # the first few files of the archive are enough
            if member.isfile():
                archive.extract(member, tmp_path, filter="data")
                taken += 1
                if {"train", "valid"} <= {path.name for path in (tmp_path / "books").iterdir()} and taken > 4:
                    break
    files = Files("text").find(str(tmp_path / "books"))
    assert {"train", "validation", "test"} == set(files)
    splits = Files("text").load(str(tmp_path / "books"), tmp_path / "arrow", STRICT)
    assert min(len(text) for text in splits["train"]["text"][:2]) > 10_000


def test_three_documents_can_be_divided_by_size(tmp_path):
    for name in ("one", "two", "three"):
        (tmp_path / f"{name}.txt").write_text(name * 9)
    with pytest.raises(
        CorpusError, match=r"none .*; data\.source\.split_by=folder divides three or more of them by size"
    ):
        prepare(Files("text", split_by="content"), str(tmp_path), Bytes(), 0, tmp_path / "cache", "error")
    divided = Files("text", split_by="folder").load(str(tmp_path), tmp_path / "arrow", STRICT)
    assert {split: len(rows) for split, rows in divided.items()} == {"train": 1, "validation": 1, "test": 1}

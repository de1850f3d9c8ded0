"""Documents stay whole, on one side of the split, and nothing is left out silently."""

import json
import logging
import os
import sysconfig
from pathlib import Path

import pytest

from data import CorpusError, Files, Hub, StandardLibrary
from data.sources import HELD_OUT_PERCENT, module_tested, split_of

BOOKS = Path(__file__).parents[3] / "shared" / "data" / "books.tar.xz"


def test_the_split_of_a_name_never_changes():
    names = [f"name{number}" for number in range(10_000)]
    sides = [split_of(name) for name in names]
    for side in ("validation", "test"):
        assert abs(sides.count(side) / 100 - HELD_OUT_PERCENT) < 1
    assert [split_of(name) for name in ("json", "email", "idlelib")] == ["train", "test", "train"]
    assert split_of("odd\udcff") in ("train", "validation", "test")  # a file name that is not UTF-8


@pytest.mark.parametrize(
    ("document", "module"),
    [
        ("json", "json"),
        ("test/test_json", "json"),
        ("json/tests", "json"),
        ("test/test_urllib2", "urllib"),
        ("test/datetimetester", "datetime"),
        ("_pydecimal", "decimal"),
        ("test/test_zipfile64", "zipfile"),
        ("test/test_complex", "complex"),  # no module of that name is written in Python
        ("zipimport", "zipimport"),  # a module is its own key, whatever shorter names it begins with
    ],
)
def test_a_test_goes_with_its_module(document, module):
    modules = {"json", "urllib", "datetime", "decimal", "zipfile", "zip", "zipimport"}
    assert module_tested(document, modules) == module


@pytest.fixture
def library(tmp_path):
    """A small Python library: modules, a package with its own tests, a test folder, and what must be left out."""
    root = tmp_path / "python3"
    files = {
        "abc.py": "abc",
        "json/__init__.py": "json init",
        "json/decoder.py": "json decoder",
        "json/inner/deep.py": "json deep",
        "json/tests/test_a.py": "json own tests",
        "test/test_json/test_b.py": "json tests",
        "test/test_abc.py": "abc tests",
        "site-packages/other.py": "installed",
        "json/__pycache__/decoder.py": "compiled",
        "_sysconfigdata__linux_x86_64-linux-gnu.py": "built",
        "config-3.11-x86_64/build.py": "built",
    }
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    (root / "test" / "latin.py").write_bytes(b"caf\xe9")
    return root


def by_name(splits) -> dict[str, str]:
    return {name: text for rows in splits.values() for name, text in zip(rows["name"], rows["text"], strict=True)}


def test_the_library_by_document(library, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    splits = StandardLibrary(tests=True).load(str(library), tmp_path)
    documents = by_name(splits)
    assert set(documents) == {"abc", "json", "json/tests", "test/test_json", "test/test_abc"}
    assert documents["json"] == (
        "# json/__init__.py\njson init\n# json/decoder.py\njson decoder\n# json/inner/deep.py\njson deep"
    )
    assert "1 files are not UTF-8 and are left out: test/latin.py" in caplog.text
    assert "2 modules and packages, 3 documents of tests" in caplog.text
    side = {name: split for split, rows in splits.items() for name in rows["name"]}
    assert side["json"] == side["json/tests"] == side["test/test_json"]
    assert [len(text) for text in splits["train"]["text"]] == sorted(map(len, splits["train"]["text"]), reverse=True)


def test_a_library_without_tests(library, tmp_path, caplog):
    import shutil

    assert set(by_name(StandardLibrary(tests=False).load(str(library), tmp_path))) == {"abc", "json"}
    assert "no tests" not in caplog.text
    shutil.rmtree(library / "test")
    shutil.rmtree(library / "json" / "tests")
    assert set(by_name(StandardLibrary(tests=True).load(str(library), tmp_path))) == {"abc", "json"}
    assert "has no tests (some distributions leave them out)" in caplog.text


def test_the_librarys_identity_is_its_content(library):
    source = StandardLibrary(tests=True)
    before = source.identity(str(library))
    os.utime(library / "abc.py", (1, 1))
    assert source.identity(str(library)) == before
    (library / "abc.py").write_text("abd")
    assert source.identity(str(library)) != before


def test_this_pythons_library_is_split_well(tmp_path):
    splits = StandardLibrary(tests=False).load(None, tmp_path)
    size = {split: sum(map(len, rows["text"])) for split, rows in splits.items()}
    assert sum(size.values()) > 8e6
    assert all(0.02 < size[split] / sum(size.values()) < 0.12 for split in ("validation", "test"))
    assert not any(os.sep in name for rows in splits.values() for name in rows["name"])


def test_not_a_library(tmp_path):
    with pytest.raises(CorpusError, match=rf"^data\.path={tmp_path}: must be "):
        StandardLibrary(tests=True).check(str(tmp_path))
    StandardLibrary(tests=True).check(sysconfig.get_path("stdlib"))


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
    documents = by_name(Files("text").load(str(folder), tmp_path / "arrow"))
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
    assert set(by_name(Files("text").load(str(tmp_path / "*.txt"), tmp_path / "arrow"))) == {"a.txt", "b.txt"}
    assert set(by_name(Files("text").load(str(tmp_path / "c.md"), tmp_path / "arrow2"))) == {"c.md"}


def test_folders_are_splits_and_validation_serves_as_test(books, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    (books / "stray.txt").write_text("left out")
    splits = Files("text").load(str(books), tmp_path / "arrow")
    assert {split: len(rows) for split, rows in splits.items()} == {"train": 12, "validation": 3, "test": 3}
    assert "validation serves as test" in caplog.text
    assert "1 files outside" in caplog.text
    (books / "test").mkdir()
    (books / "test" / "t.txt").write_text("tested")
    assert Files("text").load(str(books), tmp_path / "arrow2")["test"]["name"][:] == ["test/t.txt"]


def test_files_identity_follows_changes(books):
    source = Files("text")
    before = source.identity(str(books))
    assert source.identity(str(books)) == before != Files("body").identity(str(books))
    file = books / "train" / "00.txt"
    file.write_text(file.read_text()[::-1])
    os.utime(file, ns=(1, 1))
    assert source.identity(str(books)) != before


def test_files_that_are_not_utf8_are_named(books, tmp_path, caplog):
    (books / "train" / "bad.txt").write_bytes(b"\xff\xfe")
    splits = Files("text").load(str(books), tmp_path / "arrow")
    assert len(splits["train"]) == 12
    assert "1 files are not UTF-8" in caplog.text and "bad.txt" in caplog.text


@pytest.mark.parametrize(
    ("path", "message"),
    [
        (None, r"^data\.path=null: must be "),
        ("missing", r"^data\.path=\S+/missing: must be "),
        ("*.txt", r"^data\.path=\S+/\*\.txt: must .* \.txt \.md \.py \.jsonl \.parquet$"),
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
        Files("text").load(str(tmp_path / f"a.{kind}"), tmp_path / "arrow")
    assert by_name(Files("body").load(str(tmp_path / f"a.{kind}"), tmp_path / "arrow"))[f"a.{kind}:0"] == "x"


@pytest.fixture
def hub_folder(tmp_path):
    """A dataset folder as the hub has them: its README names a configuration and the files of each split."""
    folder = tmp_path / "pg"
    folder.mkdir()
    for split, count in (("train", 40), ("validation", 2), ("test", 3)):
        rows = [{"book": f"{split} {number}", "year": 1900} for number in range(count)]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "README.md").write_text(
        "---\nconfigs:\n- config_name: novels\n  data_files:\n  - {split: train, path: train.jsonl}\n"
        "  - {split: validation, path: validation.jsonl}\n  - {split: test, path: test.jsonl}\n---\n"
    )
    return folder


def hub(**changes) -> Hub:
    return Hub(**(dict(config="novels", split=None, revision=None, text_column="book") | changes))


def test_hub_reads_the_datasets_own_splits(hub_folder, tmp_path):
    splits = hub().load(str(hub_folder), tmp_path / "arrow")
    assert {split: len(rows) for split, rows in splits.items()} == {"train": 40, "validation": 2, "test": 3}
    assert splits["test"][1] == {"text": "test 1", "name": f"{hub_folder}/test:1"}


def test_hub_splits_one_split_by_hash(hub_folder, tmp_path):
    splits = hub(split="train").load(str(hub_folder), tmp_path / "arrow")
    assert sum(map(len, splits.values())) == 40 and len(splits["train"]) > 25


def test_hub_errors(hub_folder, tmp_path):
    with pytest.raises(CorpusError, match=r"^data\.source\.text_column=text: must .* book, year$"):
        hub(text_column="text").load(str(hub_folder), tmp_path / "arrow")
    with pytest.raises(CorpusError, match=rf"^data\.path={hub_folder}, data\.source\.config=poems: must "):
        hub(config="poems").load(str(hub_folder), tmp_path / "arrow")
    with pytest.raises(CorpusError, match=r", data\.source\.split=valid: must "):
        hub(split="valid").load(str(hub_folder), tmp_path / "arrow")
    with pytest.raises(CorpusError, match=r"^data\.path=nobody/nothing, .*: must "):
        hub().load("nobody/nothing", tmp_path / "arrow")
    with pytest.raises(CorpusError, match=r"^data\.path=null: must be "):
        hub().check(None)
    assert hub().identity(str(hub_folder)) != hub(revision="main").identity(str(hub_folder))


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
    files = Files("text")._find(str(tmp_path / "books"))
    assert {"train", "validation", "test"} == set(files)
    splits = Files("text").load(str(tmp_path / "books"), tmp_path / "arrow")
    assert min(len(text) for text in splits["train"]["text"][:2]) > 10_000

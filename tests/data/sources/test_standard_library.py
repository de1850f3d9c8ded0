"""A document of the library is a module or a package; its tests are in the same split."""

import logging
import os
import sysconfig

import pytest

from data import CorpusError, StandardLibrary
from data.sources.standard_library import module_tested
from tests.data.sources.rows import STRICT, by_name


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


def test_the_library_by_document(library, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    splits = StandardLibrary(tests=True).load(str(library), tmp_path, STRICT)
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

    assert set(by_name(StandardLibrary(tests=False).load(str(library), tmp_path, STRICT))) == {"abc", "json"}
    assert "no tests" not in caplog.text
    shutil.rmtree(library / "test")
    shutil.rmtree(library / "json" / "tests")
    assert set(by_name(StandardLibrary(tests=True).load(str(library), tmp_path, STRICT))) == {"abc", "json"}
    assert "has no tests (some distributions leave them out)" in caplog.text


def test_the_librarys_identity_is_its_content(library):
    source = StandardLibrary(tests=True)
    before = source.identity(str(library))
    os.utime(library / "abc.py", (1, 1))
    assert source.identity(str(library)) == before
    (library / "abc.py").write_text("abd")
    assert source.identity(str(library)) != before


def test_this_pythons_library_is_split_well(tmp_path):
    splits = StandardLibrary(tests=False).load(None, tmp_path, STRICT)
    size = {split: sum(map(len, rows["text"])) for split, rows in splits.items()}
    assert sum(size.values()) > 8e6
    assert all(0.02 < size[split] / sum(size.values()) < 0.12 for split in ("validation", "test"))
    assert not any(os.sep in name for rows in splits.values() for name in rows["name"])


def test_not_a_library(tmp_path):
    with pytest.raises(CorpusError, match=rf"^data\.path={tmp_path}: must be "):
        StandardLibrary(tests=True).check(str(tmp_path))
    StandardLibrary(tests=True).check(sysconfig.get_path("stdlib"))

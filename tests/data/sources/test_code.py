"""A package is one document, its files in the order of their imports, and related packages share a split."""

import logging

import pytest

from data import Code, CorpusError
from data.sources.import_order import import_order
from data.sources.splits import split_by_size
from tests.data.sources.rows import STRICT, by_name


@pytest.mark.parametrize(
    ("texts", "order"),
    [
        ({"p/a.py": "from p import b\n", "p/b.py": "import p.c as d, os\n", "p/c.py": ""}, "p/c p/b p/a"),
        ({"p/a.py": "from . import (  # first\n    z,\n    y as q,\n)\n", "p/y.py": "", "p/z.py": ""}, "p/y p/z p/a"),
        ({"p/q/a.py": "from ..b import name\n", "p/b.py": ""}, "p/b p/q/a"),
        ({"p/__init__.py": "from .b import f\n", "p/a.py": "from p import f\n", "p/b.py": ""}, "p/b p/__init__ p/a"),
        ({"src/p/__init__.py": "", "src/p/a.py": "import p.b\n", "src/p/b.py": ""}, "src/p/__init__ src/p/b src/p/a"),
        ({"p/a.py": "def f():\n    import p.b\n", "p/b.py": "import p.a\n"}, "p/a p/b"),  # later imports do not count
        ({"p/b.py": "import p.a\n", "p/a.py": "import p.b\n", "p/c.py": "import p.a\n"}, "p/b p/a p/c"),  # a cycle
        ({"p/a.py": "import p.a, numpy\nfrom x import y\nfrom . import *\n", "p/B.py": "def (:"}, "p/B p/a"),
    ],
)
def test_imports_come_before_importers(texts, order):
    paths = [f"{name}.py" for name in order.split()]
    assert import_order(texts) == paths
    assert import_order(dict(reversed(texts.items()))) == paths


def test_a_chain_of_imports_longer_than_the_recursion_limit():
    texts = {f"p/m{n:04}.py": f"import p.m{n + 1:04}\n" for n in range(3000)}
    assert import_order(texts) == sorted(texts, reverse=True)


def write(root, files):
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


@pytest.fixture
def packages(tmp_path):
    root = tmp_path / "site-packages"
    files = {
        "one/__init__.py": "from one.core import f\n",
        "one/core.py": "def f(): ...\n",
        "one/notes.txt": "no code",
        "one/tests/test_core.py": "assert f",
        "one/_vendor/two.py": "a copy",
        "one/empty.py": "",
        "two/two.py": "x = 2\n",
        "three.py": "x = 3\n",
        "one-1.0.dist-info/METADATA": "Name: one",
        "__editable___four_finder.py": "a path of this machine",
    }
    write(root, files)
    (root / "two" / "latin.py").write_bytes(b"# caf\xe9")
    return root


def test_a_document_a_package(packages, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    source = Code(extensions=(".py",), depth=1, tests=False)
    splits = source.load(str(packages), tmp_path / "arrow", STRICT)
    assert by_name(splits) == {
        "one": "# one/core.py\ndef f(): ...\n\n# one/__init__.py\nfrom one.core import f\n",
        "two": "# two/two.py\nx = 2\n",
        "three.py": "# three.py\nx = 3\n",
    }
    assert {split: len(rows) for split, rows in splits.items()} == {"train": 1, "validation": 1, "test": 1}
    for counted in ("3 packages, 5 files", "1 tests", "1 copies of other packages", "1 written by", "1 not UTF-8"):
        assert counted in caplog.text
    with_tests = Code(extensions=(".py", ".txt"), depth=1, tests=True).load(str(packages), tmp_path / "arrow2", STRICT)
    assert "# one/tests/test_core.py\nassert f" in by_name(with_tests)["one"]
    assert "# one/notes.txt\nno code" in by_name(with_tests)["one"]


def test_identity_and_documents_follow_content_alone(packages, tmp_path):
    import shutil

    source = Code(extensions=(".py",), depth=1, tests=False)
    copy = tmp_path / "copy"
    shutil.copytree(packages, copy, copy_function=shutil.copyfile)
    assert source.identity(str(copy)) == source.identity(str(packages))
    loaded = [source.load(str(root), tmp_path / root.name, STRICT) for root in (packages, copy)]
    assert [{s: rows.to_list() for s, rows in each.items()} for each in loaded[1:]] == [
        {s: rows.to_list() for s, rows in loaded[0].items()}
    ]
    (copy / "three.py").write_text("x = 4\n")
    assert source.identity(str(copy)) != source.identity(str(packages))


def test_a_checkout_by_depth(tmp_path):
    root = tmp_path / "checkout"
    write(root, {f"src/p/{name}/a.py": name for name in "abc"} | {".git/hook.py": "hidden"})
    source = Code(extensions=(".py",), depth=1, tests=False)
    with pytest.raises(CorpusError, match=r"^data\.source\.depth=1: must give at least 3 .* 1 \(src\) with \.py"):
        source.load(str(root), tmp_path / "arrow", STRICT)
    source = Code(extensions=(".py",), depth=3, tests=False)
    assert set(by_name(source.load(str(root), tmp_path / "arrow", STRICT))) == {"src/p/a", "src/p/b", "src/p/c"}
    write(root, {f"src/p/{name}/common.py": "x = 1\n" * 200 for name in "abc"})
    with pytest.raises(CorpusError, match=r"^data\.source\.depth=3: must .* without common files.* 1 \(src/p/a, "):
        source.load(str(root), tmp_path / "arrow2", STRICT)


def test_several_folders_of_code(packages, tmp_path):
    write(tmp_path / "other", {"two/two.py": "x = 2 + 2\n"})
    paths = [str(packages), str(tmp_path / "other"), str(packages / "one")]
    source = Code(extensions=(".py",), depth=1, tests=False)
    prefix = packages.name
    assert by_name(source.load(paths, tmp_path / "arrow", STRICT)) == {
        f"{prefix}/one": "# one/core.py\ndef f(): ...\n\n# one/__init__.py\nfrom one.core import f\n",
        f"{prefix}/two": "# two/two.py\nx = 2\n",
        f"{prefix}/three.py": "# three.py\nx = 3\n",
        "other/two": "# two/two.py\nx = 2 + 2\n",
    }
    assert source.identity(paths) == source.identity(paths[:2]) != source.identity(paths[0])
    with pytest.raises(CorpusError, match=r"^data\.path=\S+/missing: must be "):
        source.check([*paths, str(tmp_path / "missing")])


def test_no_folder_of_code(tmp_path):
    source = Code(extensions=(".py",), depth=1, tests=False)
    with pytest.raises(CorpusError, match=r"^data\.path=\S+/missing: must be "):
        source.check(str(tmp_path / "missing"))
    source.check(None)


def test_packages_with_a_common_file_share_a_split(tmp_path):
    root, source = tmp_path / "packages", Code(extensions=(".py",), depth=1, tests=False)
    write(root, {f"p{n:03}/{name}": f"x = {n}\n" * 200 for n in range(120) for name in ("a.py", "version.py")})

    def splits():
        loaded = source.load(str(root), tmp_path / "arrow", STRICT)
        return {name: split for split, rows in loaded.items() for name in rows["name"]}

    apart = splits()
    one_of_each = [next(name for name in apart if apart[name] == split) for split in ("train", "validation", "test")]
    write(root, {f"{name}/a.py": "x = 1\n" * 200 for name in one_of_each})
    write(root, {f"{name}/version.py": "x = 1\n" for name in apart})
    together = splits()
    assert len({together[name] for name in one_of_each}) == 1
    assert len(set(together.values())) == 3  # short files that many have in common join no packages


def test_splits_by_size():
    sizes = {f"package{n}": 100 + n % 7 for n in range(200)} | {"giant": 100_000}
    splits = split_by_size([{name: size} for name, size in sizes.items()])
    share = {split: sum(sizes[name] for name in sizes if splits[name] == split) for split in ("validation", "test")}
    assert all(0.04 < held_out / sum(sizes.values()) <= 0.05 for held_out in share.values())
    assert splits["giant"] == "train"
    assert split_by_size([{name: sizes[name]} for name in reversed(sizes)]) == splits
    # An empty or tiny document is no split of its own while there are others, and the largest one is for training.
    sizes = {"a": 300, "b": 200_000, "c": 0, "d": 200_001, "e": 200_002}
    splits = split_by_size([{name: size} for name, size in sizes.items()])
    assert {splits["b"], splits["d"]} == {"validation", "test"} and splits["a"] == splits["c"] == splits["e"] == "train"
    assert sorted(split_by_size([{"a": 1}, {"b": 1_000_000}, {"c": 1}]).values()) == ["test", "train", "validation"]
    # Of few documents, those that come nearest to 5 % are held out.
    assert split_by_size([{"a": 90}, {"b": 1}, {"c": 7}, {"d": 60}]) == {
        "a": "train",
        "b": "test",
        "c": "validation",
        "d": "train",
    }

"""The Python standard library as a source of documents."""

import hashlib
import logging
import os
import sysconfig
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import CorpusError
from .bad_documents import BadDocuments
from .base import Source
from .splits import SPLITS, split_of
from .text import read_utf8, warn_not_utf8

if TYPE_CHECKING:
    from datasets import Dataset

log = logging.getLogger(__name__)


class StandardLibrary(Source):
    """The Python source on this machine: real, long, structured documents, and no download.

    A document is a top-level module, or a package with its files one after another, each below a `# path` line. Tests
    are documents of their own, in the split of the module that they test. `path` is the library folder of a Python;
    None is that of the running one.

    tests: whether tests are included. They are more than half of the bytes, easier to predict, and missing in some
        distributions.
    """

    skips = False  # files that are not UTF-8 are always left out of their package

    def __init__(self, tests: bool):
        self.tests = tests

    def check(self, path: str | None) -> None:
        root = self._root(path)
        if not (root / "abc.py").is_file():
            raise CorpusError(
                f"data.path={root}: must be the library folder of a Python, with abc.py, or null for this Python's;"
                " data=files reads documents of your own"
            )

    def identity(self, path: str | None, cache: Path | None = None) -> dict:
        # The content and not dates: the same Python has the same fingerprint on every machine.
        root = self._root(path)
        digest = hashlib.sha256()
        for files in self._documents(root).values():
            for file in files:
                content = file.read_bytes()
                digest.update(f"{file.relative_to(root).as_posix()}\0{len(content)}\0".encode())
                digest.update(content)
        return {"source": "standard library", "content": digest.hexdigest()}

    def load(self, path: str | None, arrow_cache: Path, bad: BadDocuments) -> "dict[str, Dataset]":
        from datasets import Dataset

        root = self._root(path)
        documents = self._documents(root)
        texts, not_utf8 = {}, []
        for name, files in documents.items():
            sections = []
            for file in files:
                relative, text = file.relative_to(root).as_posix(), read_utf8(file)
                if text is None:
                    not_utf8.append(relative)
                else:
                    sections.append(f"# {relative}\n{text}")
            if sections:
                texts[name] = "\n".join(sections)
        warn_not_utf8(not_utf8)

        tests = sum("/" in name for name in texts)
        of_tests = f", {tests} documents of tests" if self.tests else ""
        log.info(f"Python library {root}: {len(texts) - tests} modules and packages{of_tests}")
        if self.tests and tests == 0:
            log.warning(f"{root} has no tests (some distributions leave them out): the corpus is about half as long")

        modules = {name for name in documents if "/" not in name and not name.startswith("_")}
        rows: dict[str, list[dict]] = {split: [] for split in SPLITS}
        for name in sorted(texts, key=lambda name: (-len(texts[name]), name)):  # long documents first
            rows[split_of(module_tested(name, modules))].append({"name": name, "text": texts[name]})
        return {split: Dataset.from_list(found) for split, found in rows.items() if found}

    @staticmethod
    def _root(path: str | None) -> Path:
        return Path(path or sysconfig.get_path("stdlib"))

    def _documents(self, root: Path) -> dict[str, list[Path]]:
        """Returns the files of each document: `json`, `test/test_json`, `unittest/test`. Only the names of tests have a
        slash.

        Files that a build or an installer wrote are left out, since they differ from machine to machine.
        """
        documents: dict[str, list[Path]] = {}
        for folder, folders, names in os.walk(root):
            at_top = Path(folder) == root
            skipped = {"site-packages", "dist-packages", "__pycache__"}
            folders[:] = sorted(name for name in folders if name not in skipped and (name.isidentifier() or not at_top))
            for name in sorted(names):
                stem, ending = os.path.splitext(name)
                if ending == ".py" and not (at_top and (stem == "sitecustomize" or not stem.isidentifier())):
                    file = Path(folder, name)
                    parts = file.relative_to(root).with_suffix("").parts
                    in_tests = len(parts) > 1 and (parts[0] == "test" or (len(parts) > 2 and "test" in parts[1]))
                    documents.setdefault("/".join(parts[:2]) if in_tests else parts[0], []).append(file)
        return {name: files for name, files in documents.items() if self.tests or "/" not in name}


def module_tested(document: str, modules: set[str]) -> str:
    """Returns the module whose name decides a document's split: json for `json`, `test/test_json` and `json/tests`.

    This is the longest module name with which the test's name begins: urllib for test_urllib2 and test_urllib_response,
    datetime for datetimetester, decimal for _pydecimal. A test that is matched with a module by chance does no harm.
    """
    folder, _, name = document.partition("/")
    if name and folder != "test":
        return folder
    name = (name or folder).removeprefix("test_").lstrip("_")
    candidates = [module for module in modules if name.startswith(module)]
    if not candidates and name.startswith("py"):
        candidates = [module for module in modules if name.removeprefix("py").startswith(module)]
    return max(candidates, key=len, default=name)

"""No files import one another in a cycle, and none imports train.py.

Imports inside functions count, those under TYPE_CHECKING do not.
"""

import ast
import graphlib
from collections.abc import Iterator

import pytest

from tests.commands import ROOT

PACKAGES = ("kernels", "data", "model", "configs", "scripts")


def modules() -> dict[str, ast.Module]:
    """The syntax tree of every file, by the dotted name of its module."""
    found = {"train": ast.parse((ROOT / "train.py").read_text())}
    for package in PACKAGES:
        for file in (ROOT / package).rglob("*.py"):
            parts = file.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = ast.parse(file.read_text())
    return found


def imported(name: str, is_package: bool, tree: ast.AST, known: set[str]) -> Iterator[str]:
    """The modules that a file names in its imports. A package that merely contains them is not counted."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom):
            above = name.split(".")[: None if is_package and node.level == 1 else -node.level + is_package]
            source = ".".join([*(above if node.level else []), *([node.module] if node.module else [])])
            for alias in node.names:
                submodule = f"{source}.{alias.name}"
                yield from (each for each in [submodule if submodule in known else source] if each in known)
        else:
            yield from imported(name, is_package, node, known)


def cycle(graph: dict[str, set[str]]) -> list[str]:
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return error.args[1]
    return []


@pytest.fixture(scope="module")
def graph() -> dict[str, set[str]]:
    """{module: the modules that it imports}."""
    trees = modules()
    packages = {name.rpartition(".")[0] for name in trees}
    return {name: set(imported(name, name in packages, tree, set(trees))) - {name} for name, tree in trees.items()}


def test_no_files_import_one_another(graph):
    assert len(graph) > 150 and sum(map(len, graph.values())) > 300, "the imports were not found"
    assert not cycle(graph)


def test_no_file_imports_train(graph):
    assert graph["train"], "the imports of train.py were not found"
    assert not [name for name, imports in graph.items() if "train" in imports]


def test_a_cycle_through_a_function_is_found():
    sources = {
        "p": "from p.a import f",
        "p.a": "def f():\n    from .b import g",
        "p.b": "from p import a",
        "p.c": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from p.a import f",
    }
    graph = {name: set(imported(name, name == "p", ast.parse(text), set(sources))) for name, text in sources.items()}
    assert graph == {"p": {"p.a"}, "p.a": {"p.b"}, "p.b": {"p.a"}, "p.c": set()}
    assert sorted(cycle(graph)) == ["p.a", "p.a", "p.b"]

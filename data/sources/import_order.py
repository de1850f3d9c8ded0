"""The order of Python files in a document: a file comes after those that it imports."""

import re
from collections.abc import Iterator, Mapping
from pathlib import PurePosixPath

# Imports that run when the module is imported: those without indentation. Imports inside functions mostly break cycles.
_IMPORT = re.compile(
    r"^(?:from[ \t]+(?P<package>[.\w]+)[ \t]+import[ \t]*(?P<names>\([^)]*\)|[^\n#;]*)"
    r"|import[ \t]+(?P<modules>[^\n#;]+))",
    re.MULTILINE,
)
_COMMENT = re.compile(r"#[^\n]*")


def import_order(texts: Mapping[str, str]) -> list[str]:
    """Returns the paths of `texts` so that imports come before importers; files of other languages keep their order.

    In a cycle of imports the file that is first by path comes last, after those that it needs.

    texts: the text of each file by its path, with slashes, from the folder from which absolute imports start.
    """
    modules = _modules(texts)
    ordered: list[str] = []
    entered: set[str] = set()
    for first in sorted(texts):
        # A depth-first search without recursion: long chains of imports exceed Python's limit.
        stack = [(first, iter((first,)))]
        while stack:
            path, left = stack[-1]
            for imported in left:
                if imported not in entered:
                    entered.add(imported)
                    stack.append((imported, iter(_imports(imported, texts[imported], modules))))
                    break
            else:
                stack.pop()
                if stack:  # the bottom of the stack stands for no file
                    ordered.append(path)
    return ordered


def _modules(texts: Mapping[str, str]) -> dict[str, str]:
    """Returns the path of each module by its dotted name, from the top folder and from its outermost package."""
    modules: dict[str, str] = {}
    for path in sorted(texts):
        name = _dotted(path)
        if name is None:
            continue
        modules.setdefault(name, path)
        package = PurePosixPath(path).parent
        while package.name and f"{package}/__init__.py" in texts:
            package = package.parent
        modules.setdefault(_dotted(PurePosixPath(path).relative_to(package).as_posix()) or name, path)
    return modules


def _imports(path: str, text: str, modules: Mapping[str, str]) -> list[str]:
    """Returns the paths of the modules that a file imports, sorted."""
    if _dotted(path) is None:
        return []
    found = set()
    for wanted in _imported_names(path, text):
        parts = wanted.split(".")
        while parts and ".".join(parts) not in modules:  # the last parts may be names in a module
            parts.pop()
        if parts:
            found.add(modules[".".join(parts)])
    return sorted(found - {path})


def _imported_names(path: str, text: str) -> Iterator[str]:
    for statement in _IMPORT.finditer(text):
        if statement["modules"] is not None:
            yield from (name.split()[0] for name in statement["modules"].split(",") if name.strip())
            continue
        package = statement["package"]
        relative = len(package) - len(package.lstrip("."))
        if relative:
            folders = PurePosixPath(path).parent.parts
            package = ".".join([*folders[: len(folders) - relative + 1], package[relative:]]).strip(".")
        names = _COMMENT.sub("", statement["names"]).strip("() \t\r\n\\")
        for name in names.split(","):
            if name.strip():
                yield f"{package}.{name.split()[0]}".strip(".")


def _dotted(path: str) -> str | None:
    """Returns the name of a module; None if the file is not Python."""
    if not path.endswith(".py"):
        return None
    return ".".join(PurePosixPath(path.removesuffix(".py").removesuffix("/__init__")).parts)

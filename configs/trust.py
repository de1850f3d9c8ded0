"""The classes that a config may name, so that a checkpoint from elsewhere cannot run code of its own.

Checkpoints and run folders hold configs, and a config names classes (`_target_`). Only these classes may be called:

- this repository's subclasses of the class that the key needs (a data source, a tokenizer, a pattern);
- classes that the user of this process named: in the YAML files and overrides of the command line, or, for those of a
  checkpoint, in `trust=my_package.MyPattern`.

Both are checked before the call, and the name before any import, since the import of a module runs its code. At the
start of a process no class of the second kind is trusted, so a command that never calls `trust` refuses them all.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from importlib import import_module
from typing import Any, TypeVar

from configs.errors import ConfigError
from configs.validation import check_arguments

Base = TypeVar("Base")
Companion = TypeVar("Companion")

TARGET = "_target_"

_trusted: ContextVar[frozenset[str]] = ContextVar("trusted", default=frozenset())
"""Import paths of the classes that the user of this process trusts."""


def trust(names: object) -> None:
    """Trusts import paths of classes until the process ends: one, a list, or null."""
    listed = [names] if isinstance(names, str) else [] if names is None else names
    if not isinstance(listed, list | tuple) or not all(isinstance(name, str) and "." in name for name in listed):
        raise ConfigError(f"trust={names}: must be the import path of a class, like my_package.MyPattern, or a list")
    _trusted.set(_trusted.get() | set(listed))


def trust_named(config: Mapping[str, Any]) -> dict[str, Any]:
    """Trusts all classes that a config names, its key `trust` included. The config must be composed from this process's
    command line, never read from a file. Returns it without that key, so that no run folder holds it."""
    own = {key: value for key, value in config.items() if key != "trust"}
    trust(config.get("trust"))
    trust([name for name in _targets(own) if "." in name])
    return own


def construct(key: str, settings: object, base: type[Base], built: Mapping[str, object] | None = None) -> Base:
    """Returns an instance of the class that `settings` names, with the other settings as keyword arguments.

    Args:
        key: of `settings` in the config, for errors.
        settings: `_target_`, the class's import path, and plain values.
        base: the class must be a subclass of it.
        built: further arguments, which are objects already; they replace settings of the same name.

    Raises:
        ConfigError: the class is not trusted, is no subclass of `base`, or takes other arguments. Errors of the
            constructor itself are not changed.
    """
    return construct_with(key, settings, base, lambda chosen: None, built)[0]


def construct_with(
    key: str,
    settings: object,
    base: type[Base],
    companion_of: Callable[[type[Base]], Callable[..., Companion] | None],
    built: Mapping[str, object] | None = None,
) -> tuple[Base, Companion | None]:
    """As `construct`, and an instance of a second class, which `companion_of` returns for the first (or None).
    Settings that are parameters of the second class are passed to it, all others to the first."""
    if not isinstance(settings, Mapping):
        raise ConfigError(f"{key}={settings}: must be a group with {TARGET}, a subclass of {_path(base)}")
    target = settings.get(TARGET)
    chosen = _import(f"{key}.{TARGET}", target, base)
    if not (isinstance(chosen, type) and issubclass(chosen, base) and not inspect.isabstract(chosen)):
        raise ConfigError(f"{key}.{TARGET}={target}: must be a subclass of {_path(base)}")
    built = built or {}
    plain = {name: value for name, value in settings.items() if name != TARGET and name not in built}
    for nested in _targets(plain):
        raise ConfigError(f"{key}: {TARGET}={nested} must not be among its values: they must be plain")
    companion = companion_of(chosen)
    if companion is None:
        check_arguments(key, plain, chosen, given=built)
        return chosen(**plain, **built), None
    check_arguments(key, plain, chosen, companion, given=built)
    theirs = {name: plain.pop(name) for name in inspect.signature(companion).parameters if name in plain}
    return chosen(**plain, **built), companion(**theirs)


def function_of(key: str, target: object, ours: Mapping[str, Callable]) -> Callable:
    """Returns the function that a `_target_` names: one of `ours` (by import path), or a trusted one of the user.

    Raises:
        ConfigError: it is neither.
    """
    if isinstance(target, str) and target in ours:
        return ours[target]
    accepted = f"must be a function like {', '.join(ours)}, or one of yours"
    found = _load(key, target, accepted) if target in _trusted.get() else None
    if not inspect.isfunction(found):
        raise ConfigError(f"{key}={target}: {accepted}")
    return found


def _import(key: str, target: object, base: type) -> object:
    """Imports `target` if it lies in the package of `base` or the user trusts it."""
    kind, known = _path(base), ", ".join(_accepted(base))
    if not isinstance(target, str) or not all(name.isidentifier() for name in target.split(".")):
        raise ConfigError(f"{key}={target}: must be the import path of a subclass of {kind}, like {known}")
    if target.partition(".")[0] != base.__module__.partition(".")[0] and target not in _trusted.get():
        raise ConfigError(
            f"{key}={target}: must be this repository's own subclass of {kind} ({known}), or, if you trust that code, "
            f"trust={target} must be on this command line"
        )
    return _load(key, target, f"must be a class that exists: {known}, or a class of yours")


def _load(key: str, target: str, accepted: str) -> object:
    """Imports the object at a dotted path. If importing its module fails, with an error of any type, raises ConfigError
    with the reason."""
    module, _, name = target.rpartition(".")
    try:
        loaded = import_module(module)
    except Exception as error:
        raise ConfigError(f"{key}={target}: {accepted}; to import it raised {type(error).__name__}: {error}") from error
    if not hasattr(loaded, name):
        raise ConfigError(f"{key}={target}: {accepted}; {module} has no {name}")
    return getattr(loaded, name)


def _targets(values: object) -> Iterator[str]:
    """Yields every `_target_` in nested dicts and lists."""
    if isinstance(values, Mapping):
        if TARGET in values:
            yield str(values[TARGET])
        values = [value for key, value in values.items() if key != TARGET]
    if isinstance(values, list | tuple):
        for value in values:
            yield from _targets(value)


def _accepted(base: type) -> list[str]:
    """Returns the import paths of this repository's public subclasses of `base`; of `base` itself if it has none."""
    found, left = [], base.__subclasses__()
    while left:
        each = left.pop()
        left += each.__subclasses__()
        public = each.__module__ == base.__module__ or _path(each) != f"{each.__module__}.{each.__name__}"
        if public and not each.__name__.startswith("_"):
            found.append(_path(each))
    return sorted(found) or [_path(base)]


def _path(named: type) -> str:
    """Returns the shortest import path of a class: that of its package if the package exports it."""
    package = named.__module__.rpartition(".")[0]
    exported = package and getattr(import_module(package), named.__name__, None) is named
    return f"{package if exported else named.__module__}.{named.__name__}"

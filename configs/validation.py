"""Checks settings against types, and reports the first wrong one as a one-line ConfigError.

pydantic compares the values with the types (schema.py, or the annotations of a class). It reads them as strict JSON,
which is what a composed YAML file holds: no text counts as a number, no 1 as true, but an integer as a float. Its
report is a location and a JSON schema; this file writes "key=value: must be ..." from them.
"""

import functools
import inspect
import json
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, PydanticSchemaGenerationError, TypeAdapter, ValidationError, create_model

from configs.aliases import renamed
from configs.errors import ConfigError, as_override

STRICT = ConfigDict(strict=True, frozen=True, extra="forbid", allow_inf_nan=False)
"""No conversion between types, no unknown keys, no NaN and no infinity."""

Schema = Mapping[str, Any]
"""A JSON schema, as pydantic writes it."""

FOLDER = Path(__file__).parent

_MISSING = object()


def validated(kind: Any, settings: Any, key: str = "") -> Any:
    """Returns `settings` as an instance of the type `kind`.

    Args:
        kind: a class of schema.py, or any other type that pydantic accepts.
        settings: plain values, as OmegaConf's `to_container` returns them.
        key: where `settings` stand in the config, for the message; "" for the whole config.

    Raises:
        ConfigError: a key is unknown, missing, or has a value that its type does not accept.
    """
    try:
        return _adapter(kind).validate_json(json.dumps(settings, default=str))
    except ValidationError as error:
        raise ConfigError(_message(error.errors()[0], _schema(kind), settings, key)) from None


def check_arguments(key: str, settings: Mapping[str, Any], *functions: Callable, given: Collection[str] = ()) -> None:
    """Raises ConfigError unless `settings` are the keyword arguments of functions or classes, by their annotations.

    Args:
        key: where `settings` stand in the config.
        settings: plain values; `_target_` is left out of them.
        functions: one, or several that share the settings.
        given: parameters that the caller passes in addition.
    """
    arguments = {name: value for name, value in settings.items() if name != "_target_"}
    validated(_arguments_of(functions, frozenset(given)), arguments, key)


@functools.cache
def _adapter(kind: Any) -> TypeAdapter:
    return TypeAdapter(kind)


@functools.cache
def _schema(kind: Any) -> Schema:
    return _adapter(kind).json_schema()


@functools.cache
def _arguments_of(functions: tuple[Callable, ...], given: frozenset[str]) -> type[BaseModel]:
    """A model with a field for each parameter that is not given."""
    arguments, extra = {}, "forbid"
    for name, parameter in (item for each in functions for item in inspect.signature(each).parameters.items()):
        if parameter.kind is parameter.VAR_KEYWORD:
            extra = "allow"
        elif parameter.kind is not parameter.VAR_POSITIONAL and name not in given:
            default = ... if parameter.default is parameter.empty else parameter.default
            arguments[name] = (_checkable(parameter.annotation), default)
    return create_model("Arguments", __config__=STRICT | {"extra": extra}, **arguments)


def _checkable(annotation: Any) -> Any:
    """The annotation, or Any where pydantic cannot compare plain values with it."""
    if annotation is inspect.Parameter.empty or isinstance(annotation, str):
        return Any
    try:
        TypeAdapter(annotation).json_schema()
    except (PydanticSchemaGenerationError, ValueError):
        return Any
    return annotation


def _message(error: Mapping[str, Any], schema: Schema, value: Any, key: str) -> str:
    """Returns one line for one of pydantic's errors. An error in an item of a list is reported under the list's key."""
    definitions = schema.get("$defs", {})
    node = schema
    for step in error["loc"]:
        group = _group(node, definitions)
        if "discriminator" in group:  # this step only names the chosen member of a union
            node = {"$ref": group["discriminator"]["mapping"][step]}
        elif step in group.get("properties", {}) or isinstance(group.get("additionalProperties"), Mapping):
            node = group.get("properties", {}).get(step, group.get("additionalProperties"))
            value = value.get(step, _MISSING)
            key = f"{key}.{step}" if key else str(step)
        elif error["type"] == "extra_forbidden":
            known = ", ".join(group.get("properties", {}))
            name = f"{key}.{step}" if key else str(step)
            given = f"{name}={as_override(error['input'])}: must be"
            if renamed(name):
                return f"{given} {renamed(name)}, as the key is called now"
            return f"{given} left out; the keys here are {known or 'none'}"
        else:
            break
    group = _group(node, definitions)
    if "discriminator" in group and isinstance(value, Mapping):
        name = group["discriminator"]["propertyName"]
        key, value = f"{key}.{name}", value.get(name, _MISSING)
        node = {"enum": list(group["discriminator"]["mapping"])}
    group_of_files = key.replace(".", "/")
    if isinstance(value, str) and (FOLDER / group_of_files / f"{value}.yaml").is_file():  # data.tokenizer=bytes
        return f"{key}={value}: must be {group_of_files}={value}, as the choice of a file is written"
    accepted = _either(_alternatives(node, definitions))
    if error["type"] == "finite_number":
        accepted = accepted.replace("a number", "a finite number")
    if value is _MISSING:
        return f"{key}: missing; must be {accepted}"
    return f"{key}={as_override(value)}: must be {accepted}"


def _group(node: Schema, definitions: Mapping[str, Schema]) -> Schema:
    """The schema behind references, and behind "or null"."""
    options = [option for option in node.get("anyOf", ()) if option.get("type") != "null"]
    if len(options) == 1:
        return _group(options[0], definitions)
    if "$ref" in node:
        return _group(definitions[node["$ref"].rpartition("/")[2]], definitions)
    return node


def _alternatives(node: Schema, definitions: Mapping[str, Schema]) -> list[str]:
    """The values that a schema accepts, in words."""
    options = node.get("anyOf") or node.get("oneOf")
    if options:
        return [words for option in options for words in _alternatives(option, definitions)]
    if "$ref" in node:
        return _alternatives(_group(node, definitions), definitions)
    if "enum" in node or "const" in node:
        return [as_override(value) for value in node.get("enum", [node.get("const")])]
    kind = node.get("type")
    if kind == "null":
        return ["null"]
    if kind == "boolean":
        return ["true", "false"]
    if kind in ("integer", "number"):
        return [f"{'an integer' if kind == 'integer' else 'a number'}{_bounds(node)}"]
    if kind == "string":
        return [node.get("description") or ("a text" if not node.get("minLength") else "a text that is not empty")]
    if kind == "array":
        return [_list(node, definitions)]
    if kind == "object":
        keys = ", ".join(node.get("properties", {}))
        return [f"a mapping with the keys {keys}" if keys else "a mapping"]
    return ["any value"]


def _list(node: Schema, definitions: Mapping[str, Schema]) -> str:
    size = f" of {node['minItems']}" if "prefixItems" in node else _least(node.get("minItems", 0))
    items = node["prefixItems"][0] if "prefixItems" in node else node.get("items", {})
    return f"a list{size}, each {_either(_alternatives(items, definitions))}"


def _least(count: int) -> str:
    return "" if not count else " of at least one" if count == 1 else f" of at least {count}"


def _bounds(node: Schema) -> str:
    signs = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
    bounds = [f"{sign} {node[name]:.12g}" for name, sign in signs.items() if name in node]
    return " " + " and ".join(bounds) if bounds else ""


def _either(alternatives: list[str]) -> str:
    *others, last = alternatives
    if any("," in words for words in alternatives):
        return "; ".join([*others, f"or {last}"]) if others else last
    return f"{', '.join(others)} or {last}" if others else last

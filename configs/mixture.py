"""Builds the source of a composed `data` group. Completes the entries of a mixture (`data.source.sources`) from
configs/data."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import yaml
from omegaconf import OmegaConf
from pydantic import Field

from configs.errors import ConfigError, refused
from configs.schema import Positive, Settings, Text
from configs.trust import TARGET, construct
from configs.validation import validated
from data.sources import MixedSource, Source

KEY = "data.source.sources"

FOLDER = Path(__file__).parent / "data"

NOT_MIXED = ("base", "mixture")


class Entry(Settings):
    """A source of a mixture.

    data: the name of a file of configs/data, which gives the defaults of `source` and `path`; null if `source` has a
        `_target_`.
    name: names the source in the names of documents and metrics; null stands for the value of `data`.
    """

    weight: Positive
    data: Text | None = None
    name: Annotated[str, Field(pattern=r"^[\w-]+$", description="a name of letters, digits, _ and -")] | None = None
    path: Text | tuple[Text, ...] | None = None
    source: dict[str, Any] = Field(default_factory=dict)


def is_mixture(data: Mapping[str, Any]) -> bool:
    """Whether a composed `data` group has several sources."""
    return isinstance(data.get("source"), Mapping) and "sources" in data["source"]


def with_whole_sources(data: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a composed `data` group whose entries of `data.source.sources` have a name, a path and a whole `source`.

    A run stores them, and does not depend on the defaults of configs/data later. Other groups are returned as they are.

    Raises:
        ConfigError: an entry is refused.
    """
    if not is_mixture(data):
        return dict(data)
    sources = data["source"]["sources"]
    if not isinstance(sources, list) or not sources:
        raise refused(KEY, sources, "a list of at least one source, like {data:code,weight:1}")
    entries = [validated(Entry, entry, f"{KEY}[{number}]") for number, entry in enumerate(sources)]
    return {**data, "source": {**data["source"], "sources": [_whole(entry) for entry in entries]}}


def build_source(data: Mapping[str, Any]) -> Source:
    """Returns the source of a composed `data` group, which reads its `path`."""
    built = {"sources": build_mixed_sources(data)} if is_mixture(data) else None
    return construct("data.source", data.get("source"), Source, built)


def build_mixed_sources(data: Mapping[str, Any]) -> list[MixedSource]:
    """Returns the sources of a composed `data` group of a mixture."""
    whole = with_whole_sources(data)["source"]["sources"]
    return [
        MixedSource(
            entry["name"], construct(f"{KEY}.{entry['name']}", entry["source"], Source), entry["path"], entry["weight"]
        )
        for entry in whole
    ]


def choice_of(source: Mapping[str, Any]) -> str | None:
    """Returns the name of the file of configs/data whose `source` is of the same class and has the most settings in
    common; None for a class of the user."""
    defaults = {choice: _defaults(choice)["source"] for choice in _choices()}
    same = {choice: settings for choice, settings in defaults.items() if settings[TARGET] == source.get(TARGET)}
    return max(same, key=lambda choice: sum(source.get(k) == v for k, v in same[choice].items()), default=None)


def _choices() -> list[str]:
    return sorted(file.stem for file in FOLDER.glob("*.yaml") if file.stem not in NOT_MIXED)


def _whole(entry: Entry) -> dict[str, Any]:
    choices = _choices()
    defaults: dict[str, Any] = {"source": {}, "path": None}
    if entry.data is not None:
        if entry.data not in choices:
            raise refused(KEY, [{"data": entry.data}], f"sources whose data is one of {', '.join(choices)}")
        defaults = _defaults(entry.data)
    elif TARGET not in entry.source:
        raise refused(KEY, [{"weight": entry.weight}], f"sources with data:, one of {', '.join(choices)}")
    name, path = entry.name or entry.data, entry.path or defaults["path"]
    if name is None:
        raise refused(KEY, [{"source": entry.source}], "sources with a name")
    if path == "???":
        raise ConfigError(f"{KEY}: {name}: must have a path")
    return {"name": name, "weight": entry.weight, "path": path, "source": _merged(defaults["source"], entry.source)}


def _merged(settings: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Returns settings with changes, in groups of them too, as the command line changes a config."""
    return OmegaConf.to_container(OmegaConf.merge(dict(settings), dict(changes)))


def _defaults(choice: str) -> dict[str, Any]:
    """Returns `source` and `path` of a file of configs/data, over those of the file that it extends."""
    settings = yaml.safe_load((FOLDER / f"{choice}.yaml").read_text(encoding="utf-8"))
    parent = settings["defaults"][0]
    below = _defaults(parent) if parent not in NOT_MIXED else {"source": {}, "path": None}
    return {
        "source": _merged(below["source"], settings.get("source", {})),
        "path": settings.get("path", below["path"]),
    }

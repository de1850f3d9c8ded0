"""Expands the varied settings of a sweep to the overrides of every job.

A dimension is one setting and its values, or several settings that change together. The jobs are the product of all
dimensions. A list of values on the command line replaces the dimension of its setting, or narrows a dimension of
several settings, or adds a dimension (`seed=1,2,3`). A single value is set in every job.

A setting of a group that varies may not exist for every choice: window attention has
`attention.patterns.local.width`, dense attention has not. Such jobs omit it, and equal jobs are merged.
"""

import itertools
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hydra.core.override_parser.types import Override

from configs.errors import ConfigError, as_override

Overrides = dict[str, str]
"""{key: value} of overrides, as on the command line."""


@dataclass(frozen=True)
class Dimension:
    """Settings, and the points: tuples of the values that they take together."""

    keys: tuple[str, ...]
    points: tuple[tuple[str, ...], ...]


def dimensions_of(vary: Mapping[str, Any]) -> list[Dimension]:
    """Returns the dimensions of `sweep.vary`: `key: [value, ...]`, or `key, key: [[value, value], ...]`."""
    dimensions = []
    for names, values in vary.items():
        if values is None:  # the command line removes it
            continue
        keys = tuple(key.strip() for key in names.split(","))
        where = f"sweep.vary.{names}={values}"
        if not isinstance(values, list) or not values:
            raise ConfigError(f"{where}: must be a list of at least one value")
        points = [value if len(keys) > 1 else [value] for value in values]
        if not all(isinstance(point, list) and len(point) == len(keys) for point in points):
            raise ConfigError(f"{where}: must be a list of lists of {len(keys)} values, one for each key")
        dimensions.append(Dimension(keys, tuple(tuple(map(as_override, point)) for point in points)))
    return dimensions


def with_command_line(
    dimensions: list[Dimension], command_line: Iterable[Override]
) -> tuple[list[Dimension], Overrides]:
    """Returns the dimensions with the command line's values, and the overrides that every job has."""
    fixed: Overrides = {}
    dimensions = list(dimensions)
    for override in command_line:
        key, values = override.get_key_element(), values_of(override)
        place = next((i for i, dimension in enumerate(dimensions) if key in dimension.keys), None)
        if place is None and len(values) == 1 and not override.is_sweep_override():
            fixed[key] = values[0]
        elif place is None:
            dimensions.append(Dimension((key,), tuple((value,) for value in values)))
        elif len(dimensions[place].keys) == 1:
            dimensions[place] = Dimension((key,), tuple((value,) for value in values))
        else:
            dimensions[place] = _narrowed(dimensions[place], key, values)
    return dimensions, fixed


def values_of(override: Override) -> list[str]:
    """Returns an override's values, as on the command line. Raises ConfigError for intervals, which need a search."""
    if not override.is_sweep_override():
        return [override.get_value_element_as_str()]
    if not override.is_discrete_sweep():
        raise ConfigError(f"{override.input_line}: must be values; intervals are for sweep=search")
    values = list(override.sweep_string_iterator())
    if not values:
        raise ConfigError(f"{override.input_line}: must have at least one value")
    return values


def _narrowed(dimension: Dimension, key: str, values: Sequence[str]) -> Dimension:
    place = dimension.keys.index(key)
    known = dict.fromkeys(point[place] for point in dimension.points)
    for value in values:
        if value not in known:
            raise ConfigError(
                f"{key}={value}: must be one of {', '.join(known)}, because {', '.join(dimension.keys)} change together"
            )
    return Dimension(dimension.keys, tuple(point for point in dimension.points if point[place] in values))


def with_baseline(before: list[Dimension], dimensions: list[Dimension], baseline: str | None) -> list[Dimension]:
    """Puts full attention first where attention varies, even if the command line omits it.

    before: the dimensions without the command line's values.
    """
    if baseline is None:
        return dimensions
    result = []
    for dimension in dimensions:
        if "attention" in dimension.keys:
            place = dimension.keys.index("attention")
            of_both = (*(p for d in before if d.keys == dimension.keys for p in d.points), *dimension.points)
            first = [point for point in of_both if point[place] == baseline]
            first = first or ([(baseline,)] if len(dimension.keys) == 1 else [])
            dimension = Dimension(dimension.keys, tuple(dict.fromkeys((*first, *dimension.points))))
        result.append(dimension)
    return result


def product(dimensions: list[Dimension], fixed: Overrides) -> list[Overrides]:
    """Returns the overrides of every job: the varied settings, then the fixed ones."""
    jobs = []
    for points in itertools.product(*(dimension.points for dimension in dimensions)):
        varied = {
            key: value
            for dimension, point in zip(dimensions, points, strict=True)
            for key, value in zip(dimension.keys, point, strict=True)
        }
        jobs.append(varied | fixed)
    return jobs


def fitting(
    jobs: list[Overrides], has_key: Callable[[Overrides, str], bool], optional: Collection[str] = ()
) -> list[Overrides]:
    """Omits settings that a job's choice does not have (see the module's docstring), and then duplicate jobs.

    Args:
        has_key: whether the config that these overrides compose has this key.
        optional: settings that no choice may have.

    Raises:
        ConfigError: no choice has a setting that is not optional.
    """
    varies = {key for key in jobs[0] if "." not in key and len({job[key] for job in jobs}) > 1}
    unused = {key for key in jobs[0] if _group(key) in varies}
    result: dict[tuple, Overrides] = {}
    for job in jobs:
        doubtful = {key for key in job if _group(key) in varies}
        certain = {key: value for key, value in job.items() if key not in doubtful}
        absent = {key for key in doubtful if not has_key(certain, key)}
        unused &= absent
        kept = {key: value for key, value in job.items() if key not in absent}
        result.setdefault(tuple(sorted(kept.items())), kept)
    for key in sorted(unused.difference(optional)):
        choices = ", ".join(dict.fromkeys(job[_group(key)] for job in jobs))
        raise ConfigError(f"{key}={jobs[0][key]}: no such key in {_group(key)}={choices}")
    return list(result.values())


def _group(key: str) -> str | None:
    """Returns the group whose choice decides whether the key exists; None for `+key`, which adds it."""
    return key.split(".")[0].lstrip("~") if "." in key and not key.startswith("+") else None


def labels(jobs: Sequence[Overrides], without: Iterable[str] = ("seed",)) -> list[str]:
    """Returns a label for every job: its attention, and as few other settings as distinguish it from other jobs.

    without: keys that no label contains.
    """
    keys = list(dict.fromkeys(key for job in jobs for key in job if key not in ("attention", *without)))
    result = [job.get("attention", "") for job in jobs]
    for key in keys:
        values: dict[str, set[str | None]] = {}
        for job, label in zip(jobs, result, strict=True):
            values.setdefault(label, set()).add(job.get(key))
        for index, job in enumerate(jobs):
            if len(values[result[index]]) > 1 and key in job:
                name = "" if "." not in key else key.rpartition(".")[2] + "="
                result[index] += f" {name}{job[key]}"
    return [label.strip() for label in result]

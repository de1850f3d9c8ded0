"""Lets Hydra read each of its files once, and compose each choice of groups once, in a process of the tests.

Hydra takes a quarter of a second for a config, and the tests compose hundreds, most of which differ in a few values.
Values of the command line are set as ever, by Hydra, in a copy.
"""

import dataclasses
import pickle
from collections.abc import Callable
from typing import Any

from hydra._internal import config_loader_impl
from hydra._internal.config_repository import ConfigRepository
from hydra._internal.defaults_list import DefaultsList, Overrides


def remember() -> None:
    loader = config_loader_impl.ConfigLoaderImpl
    ConfigRepository.load_config = _copies(
        ConfigRepository.load_config, lambda repo, config_path: (config_path, *_sources(repo))
    )
    # The same groups have the same list, an object that lives as long as the process.
    config_loader_impl.create_defaults_list = _one_list_for_each_choice(config_loader_impl.create_defaults_list)
    loader._compose_config_from_defaults_list = _copies(
        loader._compose_config_from_defaults_list, lambda loader, defaults, repo: id(defaults)
    )


def _sources(repo: Any) -> tuple[str, ...]:
    return tuple(source.path for source in repo.get_sources())


def _copies(function: Callable, key: Callable) -> Callable:
    """`function`, called once for each key; every caller gets a copy of its result."""
    results: dict[Any, bytes] = {}

    def copy_of_result(*given: Any, **named: Any) -> Any:
        if (found := key(*given, **named)) not in results:
            results[found] = pickle.dumps(function(*given, **named))
        return pickle.loads(results[found])

    return copy_of_result


def _one_list_for_each_choice(function: Callable) -> Callable:
    results: dict[tuple, DefaultsList] = {}

    def create_defaults_list(repo: Any, config_name: str, overrides_list: list, **options: Any) -> DefaultsList:
        values = Overrides(repo, overrides_list).config_overrides
        groups = [override for override in overrides_list if not any(override is value for value in values)]
        key = (config_name, *_sources(repo), *(override.input_line for override in groups), *options.items())
        if key not in results:
            results[key] = function(repo, config_name, groups, **options)
        return dataclasses.replace(results[key], config_overrides=values)

    return create_defaults_list

"""The tensors in a layout, which forecasts replace by fake ones."""

import dataclasses
from collections.abc import Callable
from typing import Any

from torch import Tensor

from kernels.patterns import Pattern

from ..attention import SequenceShard
from ..attention.hierarchical.shard import SummaryShard


def tensors_of(value: Any) -> list[Tensor]:
    """Returns every tensor in a layout, at any depth."""
    tensors: list[Tensor] = []
    map_tensors(value, lambda tensor: tensors.append(tensor) or tensor)
    return tensors


def map_tensors(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """Returns a copy of a layout in which `function` has replaced every tensor."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, list | tuple):
        return type(value)(map_tensors(each, function) for each in value)
    if isinstance(value, SequenceShard | SummaryShard):
        copy = object.__new__(type(value))
        vars(copy).update({name: map_tensors(part, function) for name, part in vars(value).items()})
        return copy
    if dataclasses.is_dataclass(value) and not isinstance(value, Pattern):
        copy = object.__new__(type(value))
        for field in dataclasses.fields(value):
            object.__setattr__(copy, field.name, map_tensors(getattr(value, field.name), function))
        return copy
    return value

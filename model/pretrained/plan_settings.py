"""The attention plan of an exported model, as plain values in its config.json."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from kernels import patterns
from kernels.patterns import Pattern
from model.config import AttentionPlan

CLASS = "class"


def plan_settings(plan: AttentionPlan) -> dict[str, Any]:
    """Returns the patterns by name, each with its class and settings, the schedule, and the size of a tile.

    Raises:
        ValueError: a pattern's class is not one of this repository's.
    """
    used = {name for entry in plan.schedule for name in ([entry] if isinstance(entry, str) else entry)}
    settings = {}
    for name, pattern in plan.patterns.items():
        if name in used:
            kind = type(pattern)
            if kind is not _class_of(kind.__name__):
                target = f"attention.patterns.{name}._target_={kind.__module__}.{kind.__qualname__}"
                raise ValueError(f"{target}: must be a class of kernels.patterns")
            settings[name] = {CLASS: kind.__name__} | dataclasses.asdict(pattern)
    schedule = [entry if isinstance(entry, str) else list(entry) for entry in plan.schedule]
    return {"patterns": settings, "schedule": schedule, "block": plan.block}


def read_plan(settings: Mapping[str, Any]) -> AttentionPlan:
    """Returns the plan that `plan_settings` wrote.

    Raises:
        ValueError: a pattern has an unknown class or other settings than its class takes.
    """
    read = {}
    for name, values in settings["patterns"].items():
        kind = _class_of(values[CLASS])
        if kind is None:
            raise ValueError(f"patterns.{name}.{CLASS}={values[CLASS]}: must be a class of kernels.patterns")
        try:
            read[name] = kind(**{key: value for key, value in values.items() if key != CLASS})
        except TypeError as error:
            raise ValueError(f"patterns.{name}: must have the settings of {values[CLASS]}: {error}") from None
    return AttentionPlan(patterns=read, schedule=settings["schedule"], block=settings["block"], backend="auto")


def _class_of(name: str) -> type[Pattern] | None:
    return getattr(patterns, name) if name in patterns.__all__ and name != Pattern.__name__ else None

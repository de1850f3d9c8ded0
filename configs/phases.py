"""The phases of a run, in which sequences are shorter or windows narrower than at its end: `phases` of train.yaml."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from typing import TYPE_CHECKING, Any

from configs import schema
from configs.build import build_plan
from configs.errors import ConfigError, refused
from configs.validation import validated
from model import AttentionPlan

if TYPE_CHECKING:
    from model.training.phases import Phase

log = logging.getLogger(__name__)

LENGTH = "data.sequence_length"

WIDTHS = "width", "window"
"""Settings of patterns that a phase may change: the width of a window, under its name in each class of patterns."""


def phase_configs(config: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Returns the composed config of each phase; that of the last one is `config`. A setting that a phase leaves out
    stays as in the phase before. Batches have as many tokens as in the last phase.

    Raises:
        ConfigError: the steps of phases do not begin at 0 or do not rise; a phase sets another key, or shrinks a
            setting; a length is no divisor of the last one; the last phase has other values than the config.
    """
    phases = config["phases"] or [{"step": 0}]
    settings = [{key: value for key, value in phase.items() if key != "step"} for phase in phases]
    _check_steps([phase["step"] for phase in phases])
    values: dict[str, int] = {}
    configs = []
    for number, each in enumerate(settings):
        for key, value in each.items():
            _check_setting(config, f"phases[{number}].{key}", key, value)
            if number and key not in values:
                raise refused("phases[0]", phases[0], f"a phase that sets {key} too, since phases[{number}] does")
            if value < values.get(key, value):
                raise refused(f"phases[{number}].{key}", value, f"at least {values[key]}, as in the phase before")
        values |= each
        configs.append(_with(config, values))
    for key, value in values.items():
        if _value(config, key) != value:
            raise refused(key, _value(config, key), f"{value}, its value in the last phase (phases[{len(phases) - 1}])")
    return configs


def _check_steps(steps: Sequence[int]) -> None:
    if steps[0] != 0:
        raise refused("phases[0].step", steps[0], "0: the first phase begins with the run")
    for number, step in enumerate(steps[1:], 1):
        if step <= steps[number - 1]:
            raise refused(f"phases[{number}].step", step, f"above {steps[number - 1]}, the step of the phase before")


def _check_setting(config: Mapping[str, Any], name: str, key: str, value: Any) -> None:
    """Checks that a phase may change a setting, and its value. `name`: the setting's, in messages."""
    known = [LENGTH, *_widths(config)]
    if key not in known:
        raise refused(name, value, f"left out; the keys of a phase are step, {', '.join(known)}")
    validated(schema.Count, value, name)
    if key == LENGTH:
        last = config["data"]["sequence_length"]
        if last % value:
            accepted = f"a divisor of {LENGTH}={last}, so that all steps have as many tokens"
            raise refused(name, value, accepted)
        if value != last and config["data"]["packing"] != "contiguous":
            accepted = f"contiguous where {LENGTH} grows: phases cut the sequences of the last one"
            raise refused("data.packing", config["data"]["packing"], accepted)


def _widths(config: Mapping[str, Any]) -> Iterator[str]:
    """The settings of the composed patterns that a phase may change."""
    for name, entry in config["attention"]["patterns"].items():
        yield from (f"attention.patterns.{name}.{each}" for each in WIDTHS if each in (entry or {}))


def _value(config: Mapping[str, Any], key: str) -> Any:
    for name in key.split("."):
        config = config[name]
    return config


def _with(config: Mapping[str, Any], values: Mapping[str, int]) -> dict[str, Any]:
    """Returns a config with the values of a phase, and batches of as many tokens."""
    changed = {**config, "attention": deepcopy(config["attention"]), "data": dict(config["data"])}
    for key, value in values.items():
        *groups, name = key.split(".")
        group = changed
        for each in groups:
            group = group[each]
        group[name] = value
    changed["data"]["batch_size"] *= config["data"]["sequence_length"] // changed["data"]["sequence_length"]
    return changed


def build_phases(config: Mapping[str, Any], plan: AttentionPlan) -> "list[Phase]":
    """Returns the phases of a composed config; none where `phases` is null.

    Args:
        plan: that of the config's `attention`, which is the last phase's.
    """
    from model.training.phases import Phase

    if config["phases"] is None:
        return []
    phases = []
    for number, (given, each) in enumerate(zip(config["phases"], phase_configs(config), strict=True)):
        data, last = each["data"], number == len(config["phases"]) - 1
        try:
            own_plan = plan if last else build_plan(each["attention"])
        except ConfigError as error:
            raise ConfigError(f"phases[{number}].{error}") from None
        widths = [f"{key}={given[key]}" for key in given if key not in ("step", LENGTH)]
        shapes = f"sequences of {data['sequence_length']:,} tokens, {data['batch_size']} a batch"
        phases.append(Phase(given["step"], data["sequence_length"], own_plan, ", ".join([shapes, *widths])))
    end = config["trainer"]["max_steps"]
    if end is not None and end <= phases[-1].step:
        key = f"phases[{len(phases) - 1}].step={phases[-1].step}"
        log.warning(
            "%s: the run ends before, at trainer.max_steps=%d, and is evaluated as if the phase began", key, end
        )
    return phases

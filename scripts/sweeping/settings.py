"""The `sweep` group, checked."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

from configs import schema
from configs.errors import ConfigError
from configs.validation import validated

MATCHES = {"tokens": "tokens", "time": "seconds", "flops": "flops"}
"""{value of sweep.match: the key of its budget}."""

BUDGET_SOURCES = {"tokens": "trainer.max_steps", "seconds": "trainer.max_seconds", "flops": "trainer.max_steps"}
"""{key of a budget: the setting of the first job that gives a budget of null}."""


@dataclass(frozen=True)
class Settings:
    """The `sweep` group (configs/sweep/base.yaml describes the keys)."""

    name: str
    vary: Mapping[str, Any]
    baseline: str | None
    match: str | None
    tokens: int | None
    seconds: float | None
    flops: float | None
    retry_failed: bool
    isolate: bool
    first_stage: schema.FirstStage | None
    control: int | None
    search: Mapping[str, Any] | None

    @staticmethod
    def of(sweep: Mapping[str, Any], given: Collection[str] = ()) -> "Settings":
        """Checks a composed `sweep` group.

        Drops a YAML's budget if the command line sets another match, or the setting that gives a budget of null.

        Args:
            given: the keys that the command line sets.

        Raises:
            ConfigError: a wrong value, or a budget on the command line that belongs to another match.
        """
        first_stage = validated(schema.Sweep, sweep, "sweep").first_stage
        settings = Settings(**{**sweep, "first_stage": first_stage})
        if first_stage and settings.search:
            raise ConfigError("sweep.first_stage: must be null in a search")
        if settings.control and (settings.search or settings.baseline is None):
            if "sweep.control" in given:
                accepted = "in a search" if settings.search else "with sweep.baseline=null"
                raise ConfigError(f"sweep.control={settings.control}: must be null {accepted}")
            settings = replace(settings, control=None)  # the control is a shorter run of the baseline
        for match, key in MATCHES.items():
            budget = getattr(settings, key)
            if budget is None:
                continue
            if settings.match != match:
                if f"sweep.{key}" in given:
                    where = f"sweep.{key}={budget}"
                    raise ConfigError(f"{where}: must be null with sweep.match={settings.match}; it is for {match}")
                settings = replace(settings, **{key: None})
            elif BUDGET_SOURCES[key] in given and f"sweep.{key}" not in given:
                settings = replace(settings, **{key: None})
        return settings

    @property
    def budget(self) -> dict[str, float] | None:
        """{key of `match`: its budget}; None where the first job gives it, or without a match."""
        key = MATCHES.get(self.match)
        return None if key is None or getattr(self, key) is None else {key: getattr(self, key)}

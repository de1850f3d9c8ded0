"""The `sweep` group, checked."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

from configs import schema
from configs.errors import ConfigError, as_override
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
    flops: float | list[float] | None  # a list: every job once with each budget
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
        if settings.budgets:
            settings._check_budgets(given)
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
    def budgets(self) -> list[float]:
        """The FLOPs of a sweep that gives every job each of several budgets, ascending; else none."""
        return sorted(self.flops) if self.match == "flops" and isinstance(self.flops, list) else []

    def _check_budgets(self, given: Collection[str]) -> None:
        where = f"sweep.flops=[{','.join(map(as_override, self.budgets))}]"
        if len(set(self.budgets)) < len(self.budgets):
            raise ConfigError(f"{where}: must be different budgets")
        for key, value in (("first_stage", self.first_stage), ("search", self.search)):
            if value is not None:
                raise ConfigError(f"{where}: must be one budget with sweep.{key}")
        if "trainer.max_steps" in given:
            raise ConfigError(f"trainer.max_steps: must be left out with {where}, which determines it")

    @property
    def budget(self) -> dict[str, Any] | None:
        """{key of `match`: its budget, or its budgets}; None where the first job gives it, or without a match."""
        key = MATCHES.get(self.match)
        return None if key is None or getattr(self, key) is None else {key: getattr(self, key)}

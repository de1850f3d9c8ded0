"""The `sweep` group, checked."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

from configs import schema
from configs.errors import ConfigError
from configs.validation import validated

MATCHES = {"tokens": "tokens", "time": "seconds", "flops": "flops"}
"""What sweep.match can be, and the key of its budget."""

OF_A_RUN = {"tokens": "trainer.max_steps", "seconds": "trainer.max_seconds", "flops": "trainer.max_steps"}
"""The setting of a run from which a budget of null is taken."""


@dataclass(frozen=True)
class Settings:
    """The `sweep` group (configs/sweep/base.yaml says what each key is)."""

    name: str
    vary: Mapping[str, Any]
    baseline: str | None
    match: str | None
    tokens: int | None
    seconds: float | None
    flops: float | None
    retry_failed: bool
    isolate: bool
    search: Mapping[str, Any] | None

    @staticmethod
    def of(sweep: Mapping[str, Any], given: Collection[str] = ()) -> "Settings":
        """Of a composed `sweep` group. Raises ConfigError, one line.

        given: the keys that the command line sets. A YAML's budget gives way to another match, and to what it would be
        taken from (OF_A_RUN); a budget on the command line that is not of the match is a mistake.
        """
        validated(schema.Sweep, sweep, "sweep")
        settings = Settings(**sweep)
        for match, key in MATCHES.items():
            budget = getattr(settings, key)
            if budget is None:
                continue
            if settings.match != match:
                if f"sweep.{key}" in given:
                    where = f"sweep.{key}={budget}"
                    raise ConfigError(f"{where}: is the budget of sweep.match={match}, not {settings.match}")
                settings = replace(settings, **{key: None})
            elif OF_A_RUN[key] in given and f"sweep.{key}" not in given:
                settings = replace(settings, **{key: None})
        return settings

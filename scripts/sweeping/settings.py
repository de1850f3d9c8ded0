"""What a YAML in configs/sweep says, checked."""

import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from configs.build import ConfigError

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
        known = [each.name for each in fields(Settings)]
        for key, value in sweep.items():
            if key not in known:
                raise ConfigError(f"sweep.{key}={value}: no such key; accepted are {', '.join(sorted(known))}")
        settings = Settings(**{key: sweep.get(key) for key in known})
        if not re.fullmatch(r"[\w.+-]+", str(settings.name)) or str(settings.name).strip(".") == "":
            raise ConfigError(f"sweep.name={settings.name}: becomes a folder: accepted are letters, digits, _ - . +")
        if settings.match not in (*MATCHES, None):
            raise ConfigError(f"sweep.match={settings.match}: must be one of {', '.join(MATCHES)}, or null")
        for match, key in MATCHES.items():
            budget = getattr(settings, key)
            if budget is None:
                continue
            number = isinstance(budget, int | float) and not isinstance(budget, bool)
            if not number or not 0 < budget < math.inf:
                raise ConfigError(f"sweep.{key}={budget}: must be a positive number, or null")
            if settings.match != match:
                if f"sweep.{key}" in given:
                    where = f"sweep.{key}={budget}"
                    raise ConfigError(f"{where}: is the budget of sweep.match={match}, not {settings.match}")
                settings = replace(settings, **{key: None})
            elif OF_A_RUN[key] in given and f"sweep.{key}" not in given:
                settings = replace(settings, **{key: None})
        for key in ("retry_failed", "isolate"):
            if not isinstance(getattr(settings, key), bool):
                raise ConfigError(f"sweep.{key}={getattr(settings, key)}: must be true or false")
        if not isinstance(settings.vary, Mapping) or not settings.vary:
            given_as = "null" if settings.vary is None else settings.vary
            raise ConfigError(f"sweep.vary={given_as}: must map settings to lists of values")
        return settings

"""The error of a wrong setting, and the notation of settings in its message."""

import re
from collections.abc import Mapping
from typing import Any


class ConfigError(ValueError):
    """A setting is refused. The message is one line: the key, the value, and the accepted values."""


def refused(key: str, value: Any, accepted: str) -> ConfigError:
    """Returns the error "key=value: must be accepted"."""
    return ConfigError(f"{key}={as_override(value)}: must be {accepted}")


def as_override(value: Any) -> str:
    """Returns a value of a YAML file in the notation of Hydra's command line."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return f"[{','.join(map(as_override, value))}]"
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{key}:{as_override(each)}" for key, each in value.items()) + "}"
    text = str(value)
    if not isinstance(value, str) or re.fullmatch(r"[\w./+-]+", text):
        return text
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"

"""The error of a folder in Hugging Face's format that cannot be read."""

import json
from pathlib import Path
from typing import Any


class PretrainedError(ValueError):
    """A file or a key does not fit. The message is one line: the file, the key, its value, and what is accepted."""


def refused(file: Path, key: str, value: Any, accepted: str) -> PretrainedError:
    """Returns the error "file: key=value: must be accepted"; the value is written as in JSON."""
    return PretrainedError(f"{file}: {key}={json.dumps(value)}: must be {accepted}")

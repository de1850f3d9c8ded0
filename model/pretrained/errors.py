"""The errors of folders in Hugging Face's format: one that cannot be read, and a model that cannot be written."""

import json
from pathlib import Path
from typing import Any


class PretrainedError(ValueError):
    """A file or a key does not fit. The message is one line: the file, the key, its value, and what is accepted."""


class ExportError(ValueError):
    """A model that the format cannot express. The message is one line: the setting, its value, and what is accepted."""


def refused(file: Path, key: str, value: Any, accepted: str) -> PretrainedError:
    """Returns the error "file: key=value: must be accepted"; the value is written as in JSON."""
    return PretrainedError(f"{file}: {key}={json.dumps(value)}: must be {accepted}")

"""The error for settings and files from which no data can be made."""


class CorpusError(ValueError):
    """A wrong setting or file. The message is one line, `key=value: must be ...`."""

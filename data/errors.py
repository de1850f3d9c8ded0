"""The error of a setting or a file of the user that the data cannot be made from."""


class CorpusError(ValueError):
    """A wrong setting or file. The message is one line, `key=value: must be ...`."""

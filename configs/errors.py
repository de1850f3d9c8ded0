"""The error of a config."""


class ConfigError(ValueError):
    """A setting that cannot be: one line with its key, its value, and what would be accepted."""

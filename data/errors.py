"""What a user can get wrong with data, as one readable line."""


class CorpusError(ValueError):
    """A setting or a file that cannot work: the message names the key, the value and what would be accepted."""

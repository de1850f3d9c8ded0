"""Reads the documents that a source loads."""

from data.sources import BadDocuments

STRICT = BadDocuments("error", None)


def by_name(splits) -> dict[str, str]:
    """The text of every document of all splits."""
    return {name: text for rows in splits.values() for name, text in zip(rows["name"], rows["text"], strict=True)}

"""Reads the documents that a source loads."""


def by_name(splits) -> dict[str, str]:
    """The text of every document of all splits."""
    return {name: text for rows in splits.values() for name, text in zip(rows["name"], rows["text"], strict=True)}

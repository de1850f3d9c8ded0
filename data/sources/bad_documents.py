"""Documents that cannot be read: the first one is an error, or each is skipped and counted."""

from typing import Any

from ..errors import CorpusError

POLICIES = ("error", "skip")
EXAMPLES = 5  # skipped documents whose places are printed and stored


class BadDocuments:
    """Applies `data.on_bad_document`, one of POLICIES, while the documents of `path` are read."""

    def __init__(self, policy: str, path: str | None):
        if policy not in POLICIES:
            raise CorpusError(f"data.on_bad_document={policy}: must be {' or '.join(POLICIES)}")
        self.policy = policy
        self.path = path
        self.count = 0
        self.examples: list[str] = []

    def add(self, place: str, found: object, accepted: str) -> None:
        """Counts a bad document.

        place: its file, with its line or row. found: what is there. accepted: what should be there.

        Raises:
            CorpusError: the policy is `error`.
        """
        found = " ".join(str(found).split())
        if self.policy == "error":
            raise CorpusError(
                f"data.path={self.path}: must hold {accepted} in {place}, and holds {found}; data.on_bad_document=skip"
                " skips such documents"
            )
        self.count += 1
        if len(self.examples) < EXAMPLES:
            self.examples.append(f"{place}: {found}")

    def summary(self) -> dict[str, Any]:
        """Returns plain values: the number of skipped documents, and the places of the first ones."""
        return {"documents": self.count, "examples": self.examples}


def describe_skipped(skipped: dict[str, Any]) -> str:
    """Returns a `BadDocuments.summary` as a sentence."""
    more = ", ..." if skipped["documents"] > len(skipped["examples"]) else ""
    return f"{skipped['documents']} documents cannot be read and are skipped: {', '.join(skipped['examples'])}{more}"


def fault_of_text(value: object) -> str | None:
    """Returns why a value is not the text of a document, or None if it is."""
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            return f"text with half a character, \\u{ord(value[error.start]):04x}"
        return None
    if value is None:
        return "null"
    if isinstance(value, bool | int | float):
        return f"the {type(value).__name__} {value}"[:40]
    return {list: "a list", dict: "an object", bytes: "binary"}.get(type(value), f"a {type(value).__name__}")

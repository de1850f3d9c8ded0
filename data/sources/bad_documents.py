"""Documents that cannot be read: the first one is an error, or each is skipped, or repaired, and counted."""

import json
from collections.abc import Sequence
from typing import Any

from ..errors import CorpusError

POLICIES = ("error", "skip", "replace")
EXAMPLES = 5  # counted documents whose places are printed and stored


class BadDocuments:
    """Applies `data.on_bad_document`, one of POLICIES, while the documents of `path` are read.

    `skip` leaves bad documents out. `replace` keeps those with bytes that are not UTF-8, which become U+FFFD, and
    raises an error for others. Either counts them.
    """

    def __init__(self, policy: str, path: str | Sequence[str] | None):
        if policy not in POLICIES:
            raise CorpusError(f"data.on_bad_document={policy}: must be {', '.join(POLICIES[:-1])} or {POLICIES[-1]}")
        self.policy = policy
        self.path = path
        self.count = 0
        self.examples: list[str] = []

    def add(self, place: str, found: object, accepted: str, repairable: bool = False) -> None:
        """Counts a bad document.

        place: its file, with its line or row. found: what is there. accepted: what should be there. repairable: whether
        `replace` would keep it.

        Raises:
            CorpusError: the policy is not `skip`.
        """
        found = " ".join(str(found).split())
        if self.policy != "skip":
            raise CorpusError(
                f"data.path={self.path}: must hold {accepted} in {place}, and holds {found}; data.on_bad_document=skip"
                f" skips such documents{', and replace writes U+FFFD for such bytes' if repairable else ''}"
            )
        self._count(place, found)

    def repair(self, place: str, text: str) -> str | None:
        """Returns a text with U+FFFD for each lone surrogate and counts the document, if the policy is `replace`; None
        otherwise, and for UTF-16 and binary files. Readers decode bytes that are not UTF-8 to lone surrogates
        (`surrogateescape`)."""
        if self.policy != "replace" or not is_repairable(text):
            return None
        self._count(place, fault_of_text(text))
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")

    def _count(self, place: str, found: object) -> None:
        self.count += 1
        if len(self.examples) < EXAMPLES:
            self.examples.append(f"{place}: {found}")

    def summary(self) -> dict[str, Any]:
        """Returns plain values: the number of documents that are skipped or repaired, and the places of the first."""
        replaced = {"replaced": True} if self.policy == "replace" else {}
        return {"documents": self.count, "examples": self.examples} | replaced


def describe_bad(bad: dict[str, Any]) -> str:
    """Returns a `BadDocuments.summary` as a sentence."""
    more = ", ..." if bad["documents"] > len(bad["examples"]) else ""
    documents, has, are = ("document", "has", "is") if bad["documents"] == 1 else ("documents", "have", "are")
    replaced = f"{has} U+FFFD in place of bytes that are not UTF-8"
    done = replaced if bad.get("replaced") else f"cannot be read and {are} skipped"
    return f"{bad['documents']} {documents} {done}: {', '.join(bad['examples'])}{more}"


def is_repairable(value: object) -> bool:
    """Whether a text that is not UTF-8 is a text. UTF-16 and most binary files (.epub, .pdf) have a NUL somewhere."""
    return isinstance(value, str) and "\0" not in value


def fault_of_text(value: object) -> str | None:
    """Returns why a value is not the text of a document, or None if it is."""
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            code = ord(value[error.start])
            if 0xDC80 <= code <= 0xDCFF:  # `surrogateescape`
                if not is_repairable(value):
                    return "NULs and bytes that are not UTF-8, as UTF-16 and binary files have"
                return f"the byte 0x{code - 0xDC00:02x} at character {error.start}, which is not UTF-8"
            return f"text with half a character, \\u{code:04x}"
        return None
    if value is None:
        return "null"
    if isinstance(value, bool | int | float):
        return json.dumps(value) if isinstance(value, bool) else f"the number {value}"[:40]
    return {list: "a list", dict: "an object", bytes: "binary"}.get(type(value), f"a {type(value).__name__}")

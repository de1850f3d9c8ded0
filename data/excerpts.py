"""A part of many documents to evaluate: the same text for every model, whatever its seed, tokenizer and patterns."""

import logging
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from .in_memory import InMemoryDocuments
from .tokenizers import Tokenizer

if TYPE_CHECKING:
    from .corpus import Split

log = logging.getLogger(__name__)

FEWEST = 16  # documents that a limit leaves, if there are as many
SMALLEST = 1 << 20  # the default limit has at least so many bytes
PER_TOKEN = 128  # bytes for each token of a training sequence: each of FEWEST documents then has about two sequences
SEED = 0  # of the documents that are drawn; with the seed of a run, each run would be scored on other text


def default_limit(sequence_length: int) -> int:
    """Returns the default limit in bytes, for a model that was trained on sequences of this many tokens."""
    return max(SMALLEST, PER_TOKEN * sequence_length)


class Excerpts:
    """The beginnings of some of `documents`, with the attributes of a corpus's Split.

    sizes: {document: size of its beginning}, in bytes of text, or in tokens where the documents have no text.
    tokenizer: that of the documents; it tokenizes the beginnings. A document of a token file
        that is not UTF-8 keeps its own tokens, as many as the size has room for.
    """

    def __init__(self, documents: "Split | InMemoryDocuments", sizes: Mapping[int, int], tokenizer: Tokenizer):
        self.documents, self.numbers = documents, sorted(sizes)
        self.names = [documents.names[number] for number in self.numbers]
        self.has_text = documents.total_bytes > 0
        whole = sizes_of(documents)
        cut = {number: size for number, size in sizes.items() if size < whole[number]}
        self._cut: dict[int, tuple[np.ndarray, bytes, int]] = {}  # tokens, text, and number of bytes
        if self.has_text:
            self._cut_texts(cut, whole, tokenizer)
        else:
            self._cut = {number: (documents.tokens(number)[: size + 1], b"", 0) for number, size in cut.items()}
        self.bytes = [
            self._cut[number][2] if number in self._cut else int(documents.bytes[number]) for number in self.numbers
        ]

    def _cut_texts(self, sizes: Mapping[int, int], whole: np.ndarray, tokenizer: Tokenizer) -> None:
        """Cuts documents to `sizes` bytes of text. whole: the bytes of each document."""
        texts: dict[int, str] = {}
        for number, size in sizes.items():
            text = self.documents.text(number).encode()
            if text == self.documents.raw(number) and len(text) == whole[number]:
                texts[number] = text[:size].decode(errors="ignore")
            else:  # a token file that is not UTF-8: its text has replacement characters, and so other tokens
                tokens = self.documents.tokens(number)
                ends = np.cumsum(tokenizer.token_bytes[tokens[1:]])
                count = int(np.searchsorted(ends, size, side="right"))
                own = int(ends[count - 1]) if count else 0
                self._cut[number] = tokens[: count + 1], tokenizer.decode_bytes(tokens[1 : count + 1]), own
        rows = [{"name": self.documents.names[number], "text": text} for number, text in texts.items()]
        beginnings = InMemoryDocuments(rows, tokenizer)
        for n, number in enumerate(texts):
            self._cut[number] = beginnings.tokens(n), beginnings.raw(n), beginnings.bytes[n]

    def __len__(self) -> int:
        return len(self.numbers)

    def tokens(self, document: int) -> np.ndarray:
        """Returns the document's tokens, integers `[tokens]` that begin with bos."""
        number = self.numbers[document]
        return self._cut[number][0] if number in self._cut else self.documents.tokens(number)

    def text(self, document: int) -> str:
        number = self.numbers[document]
        if number not in self._cut:
            return self.documents.text(number)
        return self._cut[number][1].decode(errors="replace")

    def raw(self, document: int) -> bytes:
        """Returns the bytes of the document's text."""
        number = self.numbers[document]
        return self._cut[number][1] if number in self._cut else self.documents.raw(number)

    @cached_property
    def words(self) -> list[int]:
        return [len(self.text(document).split()) if self.has_text else 0 for document in range(len(self))]

    @cached_property
    def flat(self) -> np.ndarray:
        """The tokens of all documents in their order."""
        return np.concatenate([self.tokens(document) for document in range(len(self))])

    @property
    def total_bytes(self) -> int:
        return sum(self.bytes)


def excerpts(
    documents: "Split | InMemoryDocuments", limit: int, tokenizer: Tokenizer, sources: Sequence[str] = ()
) -> "Split | InMemoryDocuments | Excerpts":
    """Returns the part of `documents` on which models are evaluated, and logs how much it is; `documents` themselves
    where they are within the limit.

    limit: the most bytes of text, or tokens where there is no text; in a mixture, for each source.
    sources: of a mixture; a document's name begins with that of its source and a slash.
    """
    sizes = sizes_of(documents)
    of_source = np.array([name.partition("/")[0] for name in documents.names]) if sources else np.zeros(len(sizes))
    chosen: dict[int, int] = {}
    for source in sources or (0,):
        numbers = np.flatnonzero(of_source == source)
        chosen |= {int(numbers[index]): size for index, size in within_limit(sizes[numbers], limit).items()}
    if sum(chosen.values()) == sizes.sum():
        return documents
    found, unit = Excerpts(documents, chosen, tokenizer), "bytes" if documents.total_bytes else "tokens"
    scored = sizes_of(found)
    log.info(
        f"evaluation.limit={limit}: {len(found):,} of {len(documents):,} documents are scored, at most their first"
        f" {scored.max():,} {unit}: {scored.sum():,} of {sizes.sum():,} {unit}; null scores everything"
    )
    return found


def within_limit(sizes: np.ndarray, limit: int) -> dict[int, int]:
    """Returns {document: how much of its beginning is taken}.

    Each document is cut to the same size: the largest at which all documents together are within the limit. If this
    size is less than limit / FEWEST, only some documents are taken, drawn at random, each cut to limit / FEWEST.
    """
    if sizes.sum() <= limit:
        return dict(enumerate(sizes.tolist()))
    taken = np.minimum(sizes, max(_common_size(sizes, limit), limit // FEWEST, 1))
    drawn = np.random.default_rng(SEED).permutation(len(sizes))
    drawn = drawn[np.cumsum(taken[drawn]) <= limit]
    return {int(document): int(taken[document]) for document in np.sort(drawn)}


def sizes_of(documents: "Split | InMemoryDocuments | Excerpts") -> np.ndarray:
    """Returns the size of each document, int64 `[documents]`: bytes of text, or tokens where there is no text."""
    if documents.total_bytes:
        return np.asarray(documents.bytes, dtype=np.int64)
    return np.array([len(documents.tokens(document)) - 1 for document in range(len(documents))])


def _common_size(sizes: np.ndarray, limit: int) -> int:
    """Returns the largest size such that all documents, each cut to it, have at most `limit` together. Uncut they have
    more."""
    ascending = np.sort(sizes)
    shorter = np.cumsum(ascending) - ascending  # all of the documents that are shorter than each one
    common = (limit - shorter) // np.arange(len(sizes), 0, -1)
    return int(common[np.argmax(common <= ascending)])

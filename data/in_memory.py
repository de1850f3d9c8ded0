"""Documents in memory, tokenized by an existing tokenizer, for the evaluation of a trained model."""

import hashlib
import logging
import tempfile
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from .errors import CorpusError
from .preparation.encoding import SECTION
from .sources import BadDocuments, Source
from .sources.bad_documents import describe_bad
from .sources.base import Paths
from .tokenizers import Tokenizer
from .tokenizers.base import warn_of_normalized

if TYPE_CHECKING:
    from datasets import Dataset

    from .corpus import Split

log = logging.getLogger(__name__)

SHOWN_BYTES = 4_000_000  # bytes of text from which a progress bar is shown


class InMemoryDocuments:
    """The documents of `rows` (columns `name` and `text`), with the attributes of a corpus's Split.

    left_out: how many documents of their source are not among them, by reason.
    """

    def __init__(self, rows: "Sequence[dict[str, str]] | Dataset", tokenizer: Tokenizer):
        self.names = [row["name"] for row in rows]
        self._texts = [row["text"] for row in rows]
        self.bytes = [len(text.encode()) for text in self._texts]
        self._tokens = self._encode(tokenizer)
        changed = sum(tokenizer.normalized(text) != text for text in self._texts)
        warn_of_normalized(tokenizer, changed, len(self._texts))
        self.words = [len(text.split()) for text in self._texts]
        self.left_out: dict[str, int] = {}

    @classmethod
    def load(
        cls, source: Source, path: Paths, tokenizer: Tokenizer, on_bad_document: str, split: str
    ) -> "InMemoryDocuments":
        """Reads and tokenizes the rows of `path` that `Source.load_evaluated` returns, except those without text. Logs
        the number of documents that are left out.

        on_bad_document: `error`, `skip` or `replace`, for documents that cannot be read (sources/bad_documents.py).

        Raises:
            CorpusError: the path cannot be read, or has no document with text.
        """
        from datasets import concatenate_datasets

        source.check_evaluated()
        source.check_settings(path, on_bad_document)
        source.use_tokenizer(tokenizer)
        with tempfile.TemporaryDirectory() as scratch:
            bad = BadDocuments(on_bad_document, path)
            found = [rows for rows in source.load_evaluated(path, Path(scratch), bad, split) if len(rows)]
            rows = concatenate_datasets(found) if found else []
            documents = cls([row for row in rows if row["text"]], tokenizer)
        if not len(documents):
            raise CorpusError(f"data.path={path}: must hold documents with text, and none was found")
        if bad.count:
            log.warning(f"data.path={path}: {describe_bad(bad.summary())}")
        if empty := len(rows) - len(documents):
            log.warning(f"data.path={path}: {empty} of {len(rows)} documents are empty and are left out")
        documents.left_out = {"unreadable": bad.count if on_bad_document == "skip" else 0, "empty": empty}
        return documents

    def _encode(self, tokenizer: Tokenizer) -> list[np.ndarray]:
        """Returns the tokens of each document. If they take seconds, a progress bar moves within each document."""
        from datasets.utils import tqdm

        total, documents = self.total_bytes, []
        with tqdm(total=total, desc="tokenize", unit="B", unit_scale=True, disable=total < SHOWN_BYTES) as progress:
            for name, text in zip(self.names, self._texts, strict=True):
                tokens = [[tokenizer.bos]]
                for section in tokenizer.chunks(text, SECTION):
                    tokens.append(tokenizer.encode_checked(name, section))
                    progress.update(len(section.encode()))
                documents.append(np.concatenate(tokens))
        return documents

    def __len__(self) -> int:
        return len(self.names)

    def tokens(self, document: int) -> np.ndarray:
        """Returns the document's tokens, integers `[tokens]` that begin with bos."""
        return self._tokens[document]

    def text(self, document: int) -> str:
        return self._texts[document]

    def raw(self, document: int) -> bytes:
        """Returns the bytes of the document's text."""
        return self._texts[document].encode()

    @cached_property
    def flat(self) -> np.ndarray:
        """The tokens of all documents in their order."""
        return np.concatenate(self._tokens)

    @property
    def total_tokens(self) -> int:
        return sum(map(len, self._tokens))

    @property
    def total_bytes(self) -> int:
        return sum(self.bytes)


def count_copies(documents: "Split | InMemoryDocuments", trained: "Split") -> int:
    """Returns how many documents have the same tokens as one of `trained`, of the same tokenizer."""
    own = [documents.tokens(document) for document in range(len(documents))]
    # Of the training documents only those are read that are as long as one of `documents`, in tokens and in bytes.
    sizes = _sizes(np.array([len(tokens) for tokens in own]), np.asarray(documents.bytes))
    alike = np.flatnonzero(np.isin(_sizes(trained.lengths, trained.bytes), sizes))
    found = {_digest_of_tokens(trained.tokens(int(other))) for other in alike}
    return sum(_digest_of_tokens(tokens) in found for tokens in own)


def _sizes(tokens: np.ndarray, text: np.ndarray) -> np.ndarray:
    """Returns a number for each pair of counts. Different pairs may have the same number if a count exceeds 2^32."""
    return (tokens.astype(np.int64) << 32) ^ text.astype(np.int64)


def _digest_of_tokens(tokens: np.ndarray) -> bytes:
    return hashlib.sha256(tokens.astype("<u4").tobytes()).digest()


def digest(documents: "Split | InMemoryDocuments") -> str:
    """Returns the sha256 of the bytes of all documents in their order. Names and the tokenizer do not change it. For
    tokens without text, it is that of the tokens."""
    found, has_text = hashlib.sha256(), documents.total_bytes > 0
    for document in range(len(documents)):
        own = documents.raw(document) if has_text else documents.tokens(document).astype("<u4").tobytes()
        found.update(len(own).to_bytes(8) + own)
    return found.hexdigest()

"""The interface of all tokenizers."""

import logging
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..errors import CorpusError

if TYPE_CHECKING:
    import tokenizers


log = logging.getLogger(__name__)


ALLOWED = "data.tokenizer.lossy=allow accepts it and marks every result"


class Tokenizer(ABC):
    """Converts text to integers and back.

    vocabulary: the number of tokens, `bos` included.
    bos: the token that begins a document.
    origin: the setting that chooses it, for errors; by default the import path of a class of the user.
    always_lossless: whether its construction makes it lossless; the documents of others are checked one by one.
    has_text: whether its tokens stand for text; without it, nothing is known per byte, and nothing can be decoded.
    token_unit: the name of a token in the units of losses (units.py): a token, or a value of a series.
    lossy: whether its tokens may stand for another text than the document's (`data.tokenizer.lossy=allow`).
    """

    vocabulary: int
    bos: int
    origin: str
    always_lossless = False
    has_text = True
    token_unit = "token"
    lossy = False

    def __init_subclass__(cls, **arguments: object) -> None:
        super().__init_subclass__(**arguments)
        cls.origin = vars(cls).get("origin", f"data.tokenizer._target_={cls.__module__}.{cls.__qualname__}")

    @property
    def per_byte(self) -> bool:
        """Whether losses are given per byte of text, which makes runs with different tokenizers comparable. Otherwise
        they are given per token, for example per value of a series."""
        return self.has_text and self.token_unit == Tokenizer.token_unit

    @property
    @abstractmethod
    def token_bytes(self) -> np.ndarray:
        """int64 `[vocabulary]`: bytes of text that each token stands for, 0 for bos. A lossy tokenizer's are not those
        of the original text."""

    @abstractmethod
    def identity(self) -> dict:
        """Returns plain values that determine the tokens of any text, given the training documents."""

    @abstractmethod
    def fit(self, texts: Iterable[str]) -> None:
        """Learns from the training documents, if there is anything to learn. `encode` works only after it."""

    def reopen(self, file: Path) -> bool:
        """Takes over what a tokenizer of the same identity learned, from the tokenizer.json that its `save` wrote.
        Returns False if the class cannot, so that `fit` must be called."""
        return False

    @abstractmethod
    def encode(self, text: str) -> np.ndarray:
        """Returns integers `[tokens]`, without bos."""

    def chunks(self, text: str, size: int) -> Iterator[str]:
        """Cuts a text into chunks of at least about `size` characters and yields them. Encoding each chunk and
        concatenating the tokens gives the tokens of the whole text. By default, the whole text is one chunk."""
        yield text

    @abstractmethod
    def decode(self, tokens: Iterable[int]) -> str:
        """Returns the text of tokens; bos adds nothing to it."""

    def decode_bytes(self, tokens: Iterable[int]) -> bytes:
        """Returns the bytes of tokens. `decode` has U+FFFD in place of those that are not UTF-8."""
        return self.decode(tokens).encode()

    def normalized(self, text: str) -> str:
        """Returns the text that the tokens of `text` stand for: the same text, unless the tokenizer normalizes it."""
        return text

    def encode_checked(self, name: str, text: str) -> np.ndarray:
        """Returns integers `[tokens]`, without bos, of a chunk or of all of the document `name`.

        Raises:
            CorpusError: the tokens do not give the text back, or the text becomes bos.
        """
        tokens = self.encode(text)
        if not self.always_lossless:
            kept, whole = ("", "") if self.lossy else (self.decode(tokens), self.normalized(text))
            if kept != whole:
                sizes = f"{len(kept.encode()):,} of {len(whole.encode()):,} bytes"
                raise CorpusError(
                    f"{self.origin}: must be lossless, and gives another text back for {name} ({sizes}); {ALLOWED}"
                )
            if (tokens == self.bos).any():
                raise CorpusError(
                    f"{self.origin}: must be lossless, and text of {name} becomes its token {self.bos}, bos"
                )
        return tokens

    def encode_all(self, names: Sequence[str], texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """As `encode_checked` of each text. Returns their tokens end to end, and the number of tokens of each, int64
        `[texts]`."""
        tokens = [self.encode_checked(*each) for each in zip(names, texts, strict=True)]
        return np.concatenate(tokens), np.array([len(each) for each in tokens], dtype=np.int64)

    @abstractmethod
    def save(self, file: Path) -> None:
        """Writes a tokenizer.json that `load` reads."""

    def to_library(self) -> "tokenizers.Tokenizer":
        """Returns a tokenizer of the `tokenizers` library with the same tokens for any text.

        Raises:
            CorpusError: the class has no such tokenizer, so its models cannot be exported.
        """
        raise CorpusError(f"{self.origin}: must be bytes, bpe or saved, or a class of yours with to_library")


def warn_of_normalized(tokenizer: Tokenizer, changed: int, documents: int, prefix: str = "") -> None:
    """Logs how many of the documents a tokenizer normalizes or loses text of, if there is any."""
    if changed and tokenizer.lossy:
        log.warning(f"{prefix}the lossy tokenizer gives another text back for {changed} of {documents} documents")
    elif changed:
        log.warning(
            f"{prefix}the tokenizer normalizes {changed} of {documents} documents: the model reads another form of some"
            " of their characters"
        )

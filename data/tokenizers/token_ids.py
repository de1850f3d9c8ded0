"""The tokenizer of token files whose tokenizer.json is missing: the numbers of tokens, without their text."""

from collections.abc import Iterable
from typing import Annotated, NoReturn

import numpy as np
from pydantic import Field

from ..errors import CorpusError
from .fixed import Fixed


class TokenIds(Fixed):
    """Tokens whose text is unknown. Models of them are trained and evaluated per token; bits per byte and generated
    text need the tokenizer.json.

    vocabulary: the number of tokens, bos included. bos: the token that separates documents.
    """

    origin = "data/tokenizer=token_ids"
    has_text = False

    def __init__(self, vocabulary: Annotated[int, Field(ge=2)], bos: Annotated[int, Field(ge=0)]):
        if bos >= vocabulary:
            raise CorpusError(f"data.tokenizer.bos={bos}: must be less than data.tokenizer.vocabulary={vocabulary}")
        self.vocabulary = vocabulary
        self.bos = bos

    @property
    def token_bytes(self) -> np.ndarray:
        return np.zeros(self.vocabulary, dtype=np.int64)

    def identity(self) -> dict:
        return {"tokenizer": "token_ids", "vocabulary": self.vocabulary, "bos": self.bos}

    def encode(self, text: str) -> NoReturn:
        raise self._without_text("encode text")

    def decode(self, tokens: Iterable[int]) -> NoReturn:
        raise self._without_text("decode tokens")

    def _without_text(self, task: str) -> CorpusError:
        return CorpusError(
            f"{self.origin}: must be a tokenizer.json to {task} (data/tokenizer=saved), since numbers of tokens have no"
            " text"
        )

"""The tokenizer of numbers: uniform bins."""

from collections.abc import Iterable
from typing import Annotated

import numpy as np
from pydantic import Field

from ..errors import CorpusError
from .fixed import Fixed

FIRST = 0x4E00  # the character of bin 0
MOST = 0x9FFF - FIRST + 1  # consecutive characters of three bytes each, all of them letters
BYTES = 3


class Bins(Fixed):
    """A token for each of `bins` uniform bins of numbers from -`limit` to `limit`, and bos.

    The text of a series of numbers has one character for each: U+4E00 and the number of its bin. So a bin is three
    bytes of text.

    The bins follow Chronos (Ansari et al. 2024, section 3.1): N centers at equal distances, the first at -limit and the
    last at limit; a number is in the bin of the nearest center, and stands for that center when it is decoded. Numbers
    beyond the limits are in the outermost bins.
    """

    origin = "data/tokenizer=bins"
    token_unit = "value"

    def __init__(self, bins: Annotated[int, Field(ge=2, le=MOST)], limit: Annotated[float, Field(gt=0)]):
        self.bins = bins
        self.limit = float(limit)
        self.vocabulary = bins + 1
        self.bos = bins

    @property
    def token_bytes(self) -> np.ndarray:
        return np.array([BYTES] * self.bins + [0], dtype=np.int64)

    def identity(self) -> dict:
        return {"tokenizer": "bins", "bins": self.bins, "limit": self.limit}

    def encode(self, text: str) -> np.ndarray:
        """Returns uint32 `[tokens]`, without bos. Raises CorpusError for a text that is no series of these bins."""
        tokens = np.frombuffer(text.encode("utf-32-le"), dtype="<u4") - np.uint32(FIRST)  # wraps below FIRST
        if (tokens >= self.bins).any():
            other = text[int(np.argmax(tokens >= self.bins))]
            raise CorpusError(
                f"{self.origin}: must be another tokenizer for text: {other!r} is none of its {self.bins} bins, which"
                " data=timeseries writes"
            )
        return tokens

    def decode(self, tokens: Iterable[int]) -> str:
        return "".join(chr(FIRST + token) for token in map(int, tokens) if token != self.bos)

    def tokens_of(self, numbers: np.ndarray) -> np.ndarray:
        """Returns the bins of numbers, int64 of the same shape."""
        places = (np.asarray(numbers, dtype=np.float64) + self.limit) * ((self.bins - 1) / (2 * self.limit))
        return np.clip(np.rint(places), 0, self.bins - 1).astype(np.int64)

    def numbers_of(self, tokens: np.ndarray) -> np.ndarray:
        """Returns the centers of bins, float64 of the same shape."""
        return np.asarray(tokens) * (2 * self.limit / (self.bins - 1)) - self.limit

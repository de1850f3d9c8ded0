"""The tokenizer without a learned vocabulary."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from .byte_characters import byte_characters
from .byte_level import BOS
from .fixed import Fixed

if TYPE_CHECKING:
    import tokenizers


class Bytes(Fixed):
    """A token for each of the 256 bytes, and bos."""

    origin = "data/tokenizer=bytes"
    vocabulary = 257
    bos = 256

    @property
    def token_bytes(self) -> np.ndarray:
        return np.array([1] * 256 + [0], dtype=np.int64)

    def identity(self) -> dict:
        return {"tokenizer": "bytes"}

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode(), dtype=np.uint8)

    def encode_all(self, names: Sequence[str], texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        sizes = np.array([len(text.encode()) for text in texts], dtype=np.int64)
        return self.encode("".join(texts)), sizes

    def decode(self, tokens: Iterable[int]) -> str:
        return self.decode_bytes(tokens).decode(errors="replace")

    def decode_bytes(self, tokens: Iterable[int]) -> bytes:
        return bytes(token for token in map(int, tokens) if token != self.bos)

    def to_library(self) -> "tokenizers.Tokenizer":
        from tokenizers import Tokenizer, models, pre_tokenizers

        vocabulary = {character: byte for byte, character in enumerate(byte_characters())}
        tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.add_special_tokens([BOS])
        return tokenizer

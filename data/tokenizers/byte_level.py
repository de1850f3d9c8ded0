"""Encoding and decoding with a tokenizer of the `tokenizers` library that has a token for every byte."""

import json
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..errors import CorpusError
from . import byte_fallback
from .base import ALLOWED, Tokenizer
from .byte_characters import byte_characters
from .chunks import CHUNK, Cutter

if TYPE_CHECKING:
    import tokenizers

BOS = "<|bos|>"
KNOWN_BOS = (BOS, "<|endoftext|>", "<|begin_of_text|>", "<s>")
"""Tokens that begin a document, here and in the tokenizers of others."""


class ByteLevel(Tokenizer):
    """Base class: subclasses train or load a `tokenizers.Tokenizer` and pass it to `_use`."""

    _tokenizer: "tokenizers.Tokenizer"
    bos: int

    def _use(self, tokenizer: "tokenizers.Tokenizer") -> None:
        """Encodes and decodes with `tokenizer` from now on.

        Raises:
            CorpusError: it is not lossless (where `lossy` is not set), or has no token that begins a document.
        """
        settings = json.loads(tokenizer.to_str())
        cutting = json.dumps(settings["pre_tokenizer"])
        lossless = '"ByteLevel"' in cutting and '"add_prefix_space": true' not in cutting
        by_characters = None if lossless else byte_fallback.without_prefix_space(settings)
        if by_characters is not None:
            tokenizer = type(tokenizer).from_str(json.dumps(by_characters))
        elif not self.lossy and (not lossless or settings["normalizer"] not in (None, {"type": "NFC"})):
            raise CorpusError(
                f"{self.origin}: must be lossless: byte-level without a prefix space, or BPE with byte_fallback;"
                f" without a normalizer but NFC; {ALLOWED}"
            )
        if settings["model"].get("dropout"):
            raise CorpusError(f"{self.origin}: must be without BPE dropout, which gives a text other tokens each time")
        missing = [] if by_characters else set(byte_characters()) - tokenizer.get_vocab(with_added_tokens=False).keys()
        if missing and not self.lossy:
            raise CorpusError(
                f"{self.origin}: must be lossless: have a token for every byte, and {len(missing)} have none; {ALLOWED}"
            )
        bos = [tokenizer.token_to_id(name) for name in KNOWN_BOS if tokenizer.token_to_id(name) is not None]
        if not bos:
            raise CorpusError(f"{self.origin}: must have a token that begins a document: one of {' '.join(KNOWN_BOS)}")
        tokenizer.encode_special_tokens = True  # text that spells <|bos|> is text
        name = tokenizer.id_to_token(bos[0])
        if bos[0] in tokenizer.encode(name, add_special_tokens=False).ids:
            raise CorpusError(
                f"{self.origin}: must have {name} as a special token: text that spells it becomes the token"
            )
        tokenizer.no_padding()
        tokenizer.no_truncation()
        self._tokenizer = tokenizer
        self._by_characters = by_characters is not None
        self._has_own_decoder = not lossless and by_characters is None
        self.bos = bos[0]

    @property
    def vocabulary(self) -> int:
        return max(self._tokenizer.get_vocab().values()) + 1  # ids may have gaps

    @cached_property
    def _bytes(self) -> list[bytes]:
        """The bytes of each token."""
        byte_of = {character: byte for byte, character in enumerate(byte_characters())}
        table = [b""] * self.vocabulary
        for token, number in self._tokenizer.get_vocab(with_added_tokens=False).items():
            if self._has_own_decoder:
                table[number] = token.encode()
            elif self._by_characters:
                table[number] = byte_fallback.bytes_of(token)
            elif all(character in byte_of for character in token):
                table[number] = bytes(byte_of[character] for character in token)
        for number, added in self._tokenizer.get_added_tokens_decoder().items():
            table[number] = b"" if added.special else added.content.encode()
        return table

    @property
    def token_bytes(self) -> np.ndarray:
        return self._sizes.copy()

    @cached_property
    def _sizes(self) -> np.ndarray:
        return np.array([len(token) for token in self._bytes], dtype=np.int64)

    def chunks(self, text: str, size: int) -> Iterator[str]:
        return self._cutter.chunks(text, size)

    @cached_property
    def _cutter(self) -> Cutter:
        return Cutter(self._tokenizer)

    def encode(self, text: str) -> np.ndarray:
        tokens, remaining = [np.empty(0, dtype=np.uint32)], self.chunks(text, CHUNK)
        while batch := list(islice(remaining, 16)):  # the library encodes the chunks of a batch in parallel
            encoded = self._tokenizer.encode_batch_fast(batch, add_special_tokens=False)
            tokens.extend(np.array(chunk.ids, dtype=np.uint32) for chunk in encoded)
        return np.concatenate(tokens)

    def encode_all(self, names: Sequence[str], texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        if any(len(text) > CHUNK for text in texts):
            return super().encode_all(names, texts)
        encoded = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        numbers = [text.ids for text in encoded]
        counts = np.array([len(each) for each in numbers], dtype=np.int64)
        tokens = np.fromiter(chain.from_iterable(numbers), np.uint32, int(counts.sum()))
        if self.always_lossless or self._give_back(tokens, counts, texts):
            return tokens, counts
        return super().encode_all(names, texts)  # names the text that does not come back

    def _give_back(self, tokens: np.ndarray, counts: np.ndarray, texts: Sequence[str]) -> bool:
        """Whether the tokens of all texts, end to end, give each text back."""
        if self.lossy or self._has_own_decoder or (tokens == self.bos).any():
            return False
        whole = "".join(map(self.normalized, texts))
        ends = np.cumsum(self._sizes[tokens])[np.cumsum(counts)[counts > 0] - 1]
        sizes = np.cumsum([len(self.normalized(text).encode()) for text in texts])[counts > 0]
        return bool((ends == sizes).all()) and self.decode(tokens) == whole

    def decode(self, tokens: Iterable[int]) -> str:
        if self._has_own_decoder:
            return self._tokenizer.decode(_numbers(tokens))
        return self.decode_bytes(tokens).decode(errors="replace")

    def decode_bytes(self, tokens: Iterable[int]) -> bytes:
        if self._has_own_decoder:
            return super().decode_bytes(tokens)
        return b"".join(map(self._bytes.__getitem__, _numbers(tokens)))

    def to_library(self) -> "tokenizers.Tokenizer":
        from tokenizers import Tokenizer

        return Tokenizer.from_str(self._tokenizer.to_str())

    def normalized(self, text: str) -> str:
        if self.lossy:
            return self.decode(self.encode(text))
        if self._by_characters:
            return byte_fallback.normalized(text)
        normalizer = self._tokenizer.normalizer
        return text if normalizer is None else "".join(map(normalizer.normalize_str, self.chunks(text, CHUNK)))

    def save(self, file: Path) -> None:
        file.write_text(self._tokenizer.to_str(pretty=True), encoding="utf-8")  # its own save() raises no OSError

    def __getstate__(self) -> dict:
        """Adds the tokenizer as JSON, because the pickle of `tokenizers` omits `encode_special_tokens`."""
        return {
            key: value for key, value in vars(self).items() if key not in ("_tokenizer", "_bytes", "_sizes", "_cutter")
        } | {"json": self._tokenizer.to_str()}

    def __setstate__(self, state: dict) -> None:
        from tokenizers import Tokenizer

        text = state.pop("json")
        vars(self).update(state)
        self._use(Tokenizer.from_str(text))


def _numbers(tokens: Iterable[int]) -> list[int]:
    return tokens.tolist() if isinstance(tokens, np.ndarray) else list(map(int, tokens))

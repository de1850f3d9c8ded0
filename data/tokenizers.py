"""Text to integers and back, exactly.

Every tokenizer here is lossless on bytes: `decode(encode(text)) == text` for any text, and a token stands for a known
number of bytes, so that a loss in nats per token becomes bits per byte without rounding. There is one special token,
`bos`, which opens a document and stands for no bytes; text never encodes to it, not even text that spells it out.

A tokenizer is described by its settings (`identity`), becomes usable by `fit` (on training text; only BPE learns
anything) and is kept with the corpus as tokenizer.json.
"""

import hashlib
import json
import logging
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from .errors import CorpusError

if TYPE_CHECKING:
    import tokenizers

log = logging.getLogger(__name__)

BOS = "<|bos|>"
KNOWN_BOS = (BOS, "<|endoftext|>", "<|begin_of_text|>", "<s>")  # what opens a document in others' tokenizers

# How BPE cuts text before it merges. After GPT-4's expression, with two changes for source code and long documents:
# a line's end and the next line's indentation are one piece, also together with the punctuation before them
# ("):\n        " can become one token; 6 % fewer tokens on Python), and numbers are cut in pairs of digits, because a
# small vocabulary has no room for all triples. There is no look-ahead in it: see `chunks`.
PIECES = (
    r"(?:[^\s\p{L}\p{N}]| )?\p{L}+"  # a word, with one space or mark before it: " self", ".append", "_name"
    r"|\p{N}{1,2}"
    r"| ?[^\s\p{L}\p{N}]+(?:\s*\n[ \t]*)?"  # marks, with the line's end and the next line's indentation
    r"|\s*\n[ \t]*"
    r"|\s+"
)
SMALLEST_VOCABULARY = 257  # every byte, and bos
TRAINING_CHARACTERS = 200_000_000  # what BPE learns from at most: more changes few merges and costs minutes


class Tokenizer(ABC):
    """Base class of all tokenizers; one of your own is a subclass, too."""

    vocabulary: int
    bos: int

    @property
    @abstractmethod
    def token_bytes(self) -> np.ndarray: ...  # int64 [vocabulary]: bytes of text that each token stands for
    @abstractmethod
    def identity(self) -> dict: ...
    @abstractmethod
    def fit(self, texts: Iterable[str]) -> None: ...
    @abstractmethod
    def encode(self, text: str) -> np.ndarray: ...  # without bos
    @abstractmethod
    def decode(self, tokens: Iterable[int]) -> str: ...  # without bos
    @abstractmethod
    def save(self, file: Path) -> None: ...


class Bytes(Tokenizer):
    """A token a byte: 256, and bos."""

    vocabulary = 257
    bos = 256

    @property
    def token_bytes(self) -> np.ndarray:
        return np.array([1] * 256 + [0], dtype=np.int64)

    def identity(self) -> dict:
        return {"tokenizer": "bytes"}

    def fit(self, texts: Iterable[str]) -> None:
        pass

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode(), dtype=np.uint8)

    def decode(self, tokens: Iterable[int]) -> str:
        return bytes(token for token in map(int, tokens) if token != self.bos).decode(errors="replace")

    def save(self, file: Path) -> None:
        file.write_text(json.dumps(self.identity()))


class _ByteLevel(Tokenizer):
    """What a byte-level tokenizer of the `tokenizers` library can do once it is there, trained or loaded."""

    _tokenizer: "tokenizers.Tokenizer"
    bos: int

    def _adopt(self, tokenizer: "tokenizers.Tokenizer", origin: str) -> None:
        """Take a `tokenizers.Tokenizer` if it is lossless and has a token that can open a document."""
        model = json.loads(tokenizer.to_str())
        cutting = json.dumps(model["pre_tokenizer"])
        lossless = '"ByteLevel"' in cutting and '"add_prefix_space": true' not in cutting
        if not lossless or model["normalizer"] is not None:
            raise CorpusError(f"{origin}: must be lossless: byte-level, without a normalizer or a prefix space")
        bos = [tokenizer.token_to_id(name) for name in KNOWN_BOS if tokenizer.token_to_id(name) is not None]
        if not bos:
            raise CorpusError(f"{origin}: must have a token that begins a document: one of {' '.join(KNOWN_BOS)}")
        tokenizer.encode_special_tokens = True  # text that spells <|bos|> is text
        tokenizer.no_padding()
        tokenizer.no_truncation()
        self._tokenizer = tokenizer
        self.bos = bos[0]

    @property
    def vocabulary(self) -> int:
        return max(self._tokenizer.get_vocab().values()) + 1  # ids may have gaps

    @cached_property
    def _bytes(self) -> list[bytes]:
        """The bytes of each token."""
        # Byte-level tokenizers write a byte as one printable character; this is GPT-2's table, read backwards.
        printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
        others = [byte for byte in range(256) if byte not in printable]
        byte_of = {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}

        table = [b""] * self.vocabulary
        for token, number in self._tokenizer.get_vocab(with_added_tokens=False).items():
            if all(character in byte_of for character in token):
                table[number] = bytes(byte_of[character] for character in token)
        for number, added in self._tokenizer.get_added_tokens_decoder().items():
            table[number] = b"" if added.special else added.content.encode()
        return table

    @property
    def token_bytes(self) -> np.ndarray:
        return np.array([len(token) for token in self._bytes], dtype=np.int64)

    def encode(self, text: str) -> np.ndarray:
        tokens, pieces = [], chunks(text)
        while batch := list(islice(pieces, 16)):  # as many at once as the library has threads to use
            encoded = self._tokenizer.encode_batch_fast(batch, add_special_tokens=False)
            tokens.extend(np.array(piece.ids, dtype=np.uint32) for piece in encoded)
        return np.concatenate(tokens)

    def decode(self, tokens: Iterable[int]) -> str:
        return b"".join(self._bytes[int(token)] for token in tokens).decode(errors="replace")

    def save(self, file: Path) -> None:
        file.write_text(self._tokenizer.to_str(pretty=True), encoding="utf-8")  # its own save() raises no OSError

    def __getstate__(self) -> dict:
        """For worker processes: `encode_special_tokens` is not part of what `tokenizers` pickles."""
        return {key: value for key, value in vars(self).items() if key not in ("_tokenizer", "_bytes")} | {
            "json": self._tokenizer.to_str()
        }

    def __setstate__(self, state: dict) -> None:
        from tokenizers import Tokenizer

        text = state.pop("json")
        vars(self).update(state)
        self._adopt(Tokenizer.from_str(text), "tokenizer")


class BPE(_ByteLevel):
    """Byte-pair encoding, trained on the training documents (Sennrich et al. 2016; on bytes as in GPT-2).

    vocabulary: how many tokens, the 256 bytes and bos included.
    """

    def __init__(self, vocabulary: int):
        if vocabulary < SMALLEST_VOCABULARY:
            least = f"at least {SMALLEST_VOCABULARY} (256 bytes and bos)"
            raise CorpusError(f"data.tokenizer.vocabulary={vocabulary}: must be {least}")
        self.wanted = vocabulary

    def identity(self) -> dict:
        return {"tokenizer": "bpe", "vocabulary": self.wanted, "pieces": PIECES, "characters": TRAINING_CHARACTERS}

    def fit(self, texts: Iterable[str]) -> None:
        from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(PIECES), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        trainer = trainers.BpeTrainer(
            vocab_size=self.wanted,
            special_tokens=[BOS],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        tokenizer.train_from_iterator(_at_most(TRAINING_CHARACTERS, texts), trainer)
        self._adopt(tokenizer, "trained tokenizer")
        if self.vocabulary < self.wanted:
            log.warning(f"data.tokenizer.vocabulary={self.wanted}: the text gives only {self.vocabulary} tokens")


class Saved(_ByteLevel):
    """A byte-level tokenizer that was trained before. `path` is its tokenizer.json, or a folder (of a run) that holds
    one; a file that `Bytes` wrote gives a `Bytes`."""

    def __new__(cls, path: str | None = None) -> "Saved | Bytes":  # unpickling passes no path
        return Bytes() if path is not None and _is_bytes(_json_file(path)) else super().__new__(cls)

    def __init__(self, path: str):
        from tokenizers import Tokenizer

        file = _json_file(path)
        if not file.is_file():
            raise CorpusError(
                f"data.tokenizer.path={path}: must be a tokenizer.json that exists, or a folder that holds one"
            )
        try:
            tokenizer = Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises bare Exception
            raise CorpusError(
                f"data.tokenizer.path={path}: must be a tokenizer.json of the `tokenizers` library: {error}"
            ) from error
        self._adopt(tokenizer, f"data.tokenizer.path={path}")

    def identity(self) -> dict:
        return {"tokenizer": "saved", "content": hashlib.sha256(self._tokenizer.to_str().encode()).hexdigest()}

    def fit(self, texts: Iterable[str]) -> None:
        pass


def load(file: Path) -> Tokenizer:
    """The tokenizer that `save` wrote."""
    return Saved(str(file))


def _json_file(path: str) -> Path:
    return Path(path) / "tokenizer.json" if Path(path).is_dir() else Path(path)


def _is_bytes(file: Path) -> bool:
    try:
        return json.loads(file.read_text()) == Bytes().identity()
    except (OSError, ValueError):
        return False


_BOUNDARY = re.compile("[A-Za-z](?= [A-Za-z])")


def chunks(text: str, size: int = 1 << 16) -> Iterator[str]:
    """`text` in pieces of about `size` characters that encode, one by one, to the same tokens as the whole.

    `tokenizers` takes about 140 bytes of memory a character on one string, 1.4 GB on a long novel's collected edition.
    We cut between a letter and a space that has a letter behind it: there, every pre-tokenizer in use (ours, GPT-2's,
    GPT-4's, Llama's, Qwen's) cuts too, since it keeps a space with the word that follows, and what it does with the
    letters on the left depends on nothing to the right. Text without such a place stays in one piece.
    """
    start = 0
    while boundary := _BOUNDARY.search(text, start + size):
        yield text[start : boundary.end()]
        start = boundary.end()
    yield text[start:]


def _at_most(characters: int, texts: Iterable[str]) -> Iterator[str]:
    seen = 0
    for text in texts:
        if seen >= characters:
            log.info(f"BPE learns from the first {seen:,} characters of the training documents")
            return
        seen += len(text)
        yield from chunks(text)

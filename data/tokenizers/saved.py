"""Tokenizers read from a tokenizer.json."""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

from ..errors import CorpusError
from .base import Tokenizer
from .byte_level import ByteLevel
from .byte_tokens import Bytes


class Saved(ByteLevel):
    """A lossless tokenizer that was trained before: byte-level, or BPE with a token for every byte.

    path: a tokenizer.json, or a folder, like that of a run, that holds one. A file that `Bytes` wrote gives a `Bytes`.
    """

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
        self._use(tokenizer, f"data.tokenizer.path={path}")

    def identity(self) -> dict:
        return {"tokenizer": "saved", "content": hashlib.sha256(self._tokenizer.to_str().encode()).hexdigest()}

    def fit(self, texts: Iterable[str]) -> None:
        pass


def load(file: Path) -> Tokenizer:
    """Returns the tokenizer that `save` wrote."""
    return Saved(str(file))


def _json_file(path: str) -> Path:
    return Path(path) / "tokenizer.json" if Path(path).is_dir() else Path(path)


def _is_bytes(file: Path) -> bool:
    try:
        return json.loads(file.read_text()) == Bytes().identity()
    except (OSError, ValueError):
        return False

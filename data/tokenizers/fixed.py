"""The base class of tokenizers whose vocabulary is fixed."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

from .base import Tokenizer


class Fixed(Tokenizer):
    """A tokenizer that learns nothing and encodes each character on its own, so a text can be cut anywhere. Its
    `identity` is the content of its tokenizer.json (saved.py reads it)."""

    always_lossless = True

    def fit(self, texts: Iterable[str]) -> None:
        pass

    def chunks(self, text: str, size: int) -> Iterator[str]:
        return (text[start : start + size] for start in range(0, max(len(text), 1), size))

    def save(self, file: Path) -> None:
        file.write_text(json.dumps(self.identity()))

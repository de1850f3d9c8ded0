"""Tokenizers read from a tokenizer.json."""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

from ..errors import CorpusError
from .base import Tokenizer
from .bins import Bins
from .byte_level import ByteLevel
from .byte_tokens import Bytes
from .token_ids import TokenIds

REFUSE, ALLOW = "refuse", "allow"
LOSSY = "lossy"
"""The key with which a lossy tokenizer.json is marked. Other libraries do not read a file that has it."""


class Saved(ByteLevel):
    """A tokenizer that was trained before. A lossless one is byte-level, or BPE with a token for every byte.

    path: a tokenizer.json, or a folder, like that of a run, that holds one. A file that `Bytes`, `Bins` or
        `TokenIds` wrote gives one of these.
    lossy: `refuse` a tokenizer whose tokens do not give the text back, or `allow` it: then its `identity`, which
        every result holds, and the files that `save` writes are marked.
    """

    def __new__(
        cls, path: str | None = None, lossy: str = REFUSE
    ) -> "Saved | Bytes | Bins | TokenIds":  # unpickling passes no path
        other = _without_merges(_json_file(path)) if path is not None else None
        if other is None:
            return super().__new__(cls)
        other.origin = _origin(path)
        return other

    def __init__(self, path: str, lossy: str = REFUSE):
        from tokenizers import Tokenizer

        if lossy not in (REFUSE, ALLOW):
            raise CorpusError(f"data.tokenizer.lossy={lossy}: must be {REFUSE} or {ALLOW}")
        file = _json_file(path)
        if not file.is_file():
            raise CorpusError(
                f"data.tokenizer.path={path}: must be a tokenizer.json that exists, or a folder that holds one"
            )
        try:
            settings = json.loads(file.read_text(encoding="utf-8"))
            marked = settings.pop(LOSSY, REFUSE)
            tokenizer = Tokenizer.from_str(json.dumps(settings))
        except Exception as error:  # the library raises bare Exception
            raise CorpusError(
                f"data.tokenizer.path={path}: must be a tokenizer.json of the `tokenizers` library: {error}"
            ) from error
        self.lossy = ALLOW in (lossy, marked)
        self.origin = _origin(path)
        self._use(tokenizer)

    def identity(self) -> dict:
        content = hashlib.sha256(self._tokenizer.to_str().encode()).hexdigest()
        return {"tokenizer": "saved", "content": content} | ({LOSSY: ALLOW} if self.lossy else {})

    def save(self, file: Path) -> None:
        super().save(file)
        if self.lossy:
            settings = {LOSSY: ALLOW} | json.loads(file.read_text(encoding="utf-8"))
            file.write_text(json.dumps(settings, indent=2, ensure_ascii=False), encoding="utf-8")

    def fit(self, texts: Iterable[str]) -> None:
        pass


def load(file: Path) -> Tokenizer:
    """Returns the tokenizer that `save` wrote."""
    return Saved(str(file))


def _origin(path: str) -> str:
    return f"data.tokenizer.path={path}"


def _json_file(path: str) -> Path:
    return Path(path) / "tokenizer.json" if Path(path).is_dir() else Path(path)


def _without_merges(file: Path) -> Bytes | Bins | TokenIds | None:
    """Returns the tokenizer whose `identity` is the content of a file; None for the files of other tokenizers."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if content == Bytes().identity():
        return Bytes()
    if isinstance(content, dict) and content.get("tokenizer") == "bins":
        return Bins(content["bins"], content["limit"])
    if isinstance(content, dict) and content.get("tokenizer") == "token_ids":
        return TokenIds(content["vocabulary"], content["bos"])
    return None

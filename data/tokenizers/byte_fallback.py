"""Tokenizers like those of Llama 2 and Mistral 7B: BPE on characters, in which "▁" is a space and <0x0A> is a byte.

They put a space before the text. It is left out here, so that tokens give the text back: the first word of a document
then has the token that it has within a line.
"""

import re
from typing import Any

SPACE = "▁"
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
DECODER = {
    "type": "Sequence",
    "decoders": [
        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ],
}
"""Gives the text back; that of a tokenizer.json of this kind also takes the space before the text away."""


def without_prefix_space(settings: dict[str, Any]) -> dict[str, Any] | None:
    """Changes the settings of a BPE tokenizer with byte fallback so that it adds no space in front of the text.

    settings: the content of a tokenizer.json. Returns the changed content, or None if the settings describe another
    kind of tokenizer, or one that loses text.
    """
    model, cut = settings["model"], settings["pre_tokenizer"]
    steps = _steps(settings["normalizer"])
    prefix = [{"type": "Prepend", "prepend": SPACE}]
    spaces = [{"type": "Replace", "pattern": {"String": " "}, "content": SPACE}]
    lossless = (
        model["type"] == "BPE"
        and model.get("byte_fallback")
        and {f"<0x{byte:02X}>" for byte in range(256)} <= (model["vocab"].keys())
    )
    if not lossless:
        return None
    settings = settings | {"decoder": DECODER}
    if cut is None and steps in (prefix + spaces, spaces):
        return settings | {"normalizer": spaces[0]}
    if cut is not None and cut["type"] == "Metaspace" and cut["replacement"] == SPACE and not steps:
        return settings | {"pre_tokenizer": cut | {"prepend_scheme": "never"}}
    return None


def bytes_of(token: str) -> bytes:
    """The bytes of text that a token stands for."""
    byte = _BYTE.fullmatch(token)
    return bytes([int(byte[1], 16)]) if byte else token.replace(SPACE, " ").encode()


def normalized(text: str) -> str:
    """The text that the tokens of `text` stand for."""
    return text.replace(SPACE, " ")


def _steps(normalizer: dict[str, Any] | None) -> list[dict[str, Any]]:
    if normalizer is None:
        return []
    return normalizer["normalizers"] if normalizer["type"] == "Sequence" else [normalizer]

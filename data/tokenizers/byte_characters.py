"""GPT-2's table of a printable character for each byte, with which byte-level tokenizers write their vocabulary."""

from functools import cache


@cache
def byte_characters() -> list[str]:
    """Returns the character of each byte."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    character = {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}
    return [character[byte] for byte in range(256)]

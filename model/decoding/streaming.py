"""Tokens to text as they come: never half a character, and nothing of a stop string or what follows it."""

from collections.abc import Callable, Sequence

LONGEST_CHARACTER = 4
"""Bytes of UTF-8, and so tokens at most."""


class TextStream:
    """`decode`: tokens -> text, in which broken characters are U+FFFD. `stop`: strings that end the text."""

    def __init__(self, decode: Callable[[Sequence[int]], str], stop: Sequence[str]) -> None:
        self.decode, self.stop = decode, tuple(stop)
        self.text = ""
        """All that was given out."""
        self.ended = False
        """Whether a stop string came."""
        self._tokens: list[int] = []
        self._held = ""

    def add(self, token: int) -> str:
        """The text that is certain now: what might be the beginning of a stop string is held back."""
        if self.ended:
            return ""
        self._tokens.append(token)
        text = self.decode(self._tokens)
        if text.endswith("\ufffd") and len(self._tokens) < LONGEST_CHARACTER:
            return ""
        self._tokens.clear()
        self._held += text
        found = [place for place in map(self._held.find, self.stop) if place >= 0]
        if found:
            self.ended = True
            return self._give(min(found))
        held = max((n for stop in self.stop for n in range(1, len(stop)) if self._held.endswith(stop[:n])), default=0)
        return self._give(len(self._held) - held)

    def flush(self) -> str:
        """What is left when no more tokens come."""
        if self.ended:
            return ""
        self._held += self.decode(self._tokens)
        self._tokens.clear()
        return self._give(len(self._held))

    def _give(self, count: int) -> str:
        given, self._held = self._held[:count], self._held[count:]
        self.text += given
        return given

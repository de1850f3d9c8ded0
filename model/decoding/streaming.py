"""Tokens to text as they come: never half a character, and nothing of a stop string or what follows it."""

from collections.abc import Callable, Sequence

BROKEN = "\ufffd"


class TextStream:
    """`decode`: tokens -> text, in which broken characters are U+FFFD. `stop`: strings that end the text."""

    def __init__(self, decode: Callable[[Sequence[int]], str], stop: Sequence[str]) -> None:
        self.decode, self.stop = decode, tuple(stop)
        self.text = ""
        """All that was given out."""
        self.ended = False
        """Whether a stop string came."""
        self._tokens: list[int] = []
        """Since the last one that ended with a whole character."""
        self._taken = 0
        """Characters of theirs that are in `_held` or were given out."""
        self._held = ""

    def add(self, token: int) -> str:
        """The text that is certain now: what might be the beginning of a stop string is held back."""
        if self.ended:
            return ""
        self._tokens.append(token)
        self._take(whole=True)
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
        self._take(whole=False)
        return self._give(len(self._held))

    def _take(self, whole: bool) -> None:
        """Holds what the tokens have brought; `whole`: without a last character that may be but half of one. Of broken
        bytes all but the last character will stay what they are."""
        text = self.decode(self._tokens)
        certain = len(text) - (whole and text.endswith(BROKEN))
        self._held += text[self._taken : certain]
        self._taken = certain
        if certain == len(text):
            self._tokens.clear()
            self._taken = 0

    def _give(self, count: int) -> str:
        given, self._held = self._held[:count], self._held[count:]
        self.text += given
        return given

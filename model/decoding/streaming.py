"""Converts tokens to text one by one: whole characters only, and no text from a stop string on."""

from collections.abc import Callable, Sequence

BROKEN = "\ufffd"


class TextStream:
    """`decode`: tokens -> text, in which broken characters are U+FFFD. `stop`: strings that end the text."""

    def __init__(self, decode: Callable[[Sequence[int]], str], stop: Sequence[str]) -> None:
        self.decode, self.stop = decode, tuple(stop)
        self.text = ""
        """The text returned so far."""
        self.ended = False
        """Whether a stop string has occurred."""
        self._tokens: list[int] = []
        """The tokens since the last one that ended with a whole character."""
        self._taken = 0
        """Number of characters of these tokens that are in `_held` or were returned."""
        self._held = ""

    def add(self, token: int) -> str:
        """Returns the new text, except for an end that may be the beginning of a stop string."""
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
        """Returns the rest of the text, after the last token."""
        if self.ended:
            return ""
        self._take(whole=False)
        return self._give(len(self._held))

    def _take(self, whole: bool) -> None:
        """Adds the characters of the new tokens to `_held`. `whole`: except for a broken last character, which the next
        token may complete. Broken characters before the last one cannot change any more."""
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

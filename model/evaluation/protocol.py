"""Scoring protocols: how a document is cut into segments that score each of its tokens exactly once."""

from collections.abc import Iterator
from dataclasses import dataclass

NAMES = ("whole", "sliding", "chunked")


@dataclass(frozen=True)
class Segment:
    """The model reads tokens `[start, stop)` of a document. Its predictions of the tokens `[scored, stop]` are scored;
    token `i + 1` is predicted from tokens `[start, i]`."""

    start: int
    stop: int
    scored: int


@dataclass(frozen=True)
class Protocol:
    """`whole`: one pass over the document. `sliding`: windows of `window` tokens, `stride` apart, each scored on the
    tokens that no earlier window scored, so that every token but the first window's sees at least `window - stride`
    tokens (`stride` null: half a window). `chunked`: disjoint windows, each starting from nothing.

    Raises:
        ValueError: an unknown name, or sizes that do not fit; the message names the key.
    """

    name: str
    window: int | None
    stride: int | None

    def __post_init__(self) -> None:
        if self.name not in NAMES:
            raise ValueError(f"protocol.name={self.name!r}: must be one of {', '.join(NAMES)}")
        if self.name != "whole" and (self.window is None or self.window < 1):
            raise ValueError(f"protocol.window={self.window}: must be an integer >= 1 for protocol.name={self.name}")
        if self.name == "sliding" and self.stride is None:
            object.__setattr__(self, "stride", -(-self.window // 2))
        if self.name == "sliding" and (self.stride is None or not 1 <= self.stride <= self.window):
            raise ValueError(f"protocol.stride={self.stride}: must lie between 1 and protocol.window={self.window}")

    @property
    def min_context(self) -> int | None:
        """Least number of tokens before a scored token after the first window; None: all tokens that precede it."""
        return {"whole": None, "sliding": (self.window or 0) - (self.stride or 0), "chunked": 0}[self.name]

    def segments(self, tokens: int) -> Iterator[Segment]:
        """Yields the segments of a document of `tokens` tokens, the beginning-of-document token included."""
        inputs = tokens - 1  # the last token is only ever predicted
        if inputs < 1:
            return
        window = inputs if self.name == "whole" else self.window
        step = {"whole": window, "sliding": self.stride, "chunked": window}[self.name]
        scored = 1
        start = 0
        while scored <= inputs:
            stop = min(start + window, inputs)
            yield Segment(start, stop, scored)
            scored = stop + 1
            start += step

    def describe(self) -> dict[str, object]:
        """Returns the protocol as evaluation.json holds it."""
        return {
            "name": self.name,
            "window": self.window,
            "stride": self.stride,
            "min_context": self.min_context,
            "bos": True,
        }

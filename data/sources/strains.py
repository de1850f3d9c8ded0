"""Regions that two genomes share, as strains of one species do: one strain's region followed by the other's.

The second half of such a document is nearly a copy of the first. A model predicts it well only if it sees as many bases
back as a region has.
"""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

K = 24
"""Length of an anchor in bases. Two unrelated genomes share hardly any anchors, two strains share most of them."""

STEP = 16
"""Distance in bases between neighbouring anchors of the first region."""

LEAST_SHARED = 0.25
"""Least share of the first region's anchors that the second region must contain at about the same offset."""


def pairs(texts: Mapping[str, str], lengths: Sequence[int]) -> Iterator[dict[str, str]]:
    """Yields a document {"name", "text"} for each region that two of `texts` share on the same strand, for each length
    and in both orders. The regions of the first text do not overlap.

    Args:
        texts: {name: sequence of A, C, G and T}.
        lengths: bases of a region; a document has twice as many.
    """
    codes = {name: _codes(text) for name, text in texts.items() if len(text) >= K}
    for other in codes:
        anchors = _once(codes[other])
        for name in codes:
            for length in lengths if name != other else ():
                for start, place in _shared(codes[name], anchors, len(texts[other]), length):
                    text = texts[name][start : start + length] + texts[other][place : place + length]
                    yield {"name": f"{name}:{start}+{other}:{place}:{length}", "text": text}


def _shared(
    codes: np.ndarray, anchors: tuple[np.ndarray, np.ndarray], bases: int, length: int
) -> Iterator[tuple[int, int]]:
    """Yields (start in the first sequence, start in the second) of regions of `length` bases. The second start is that
    of the median anchor.

    Args:
        codes: of the first sequence.
        anchors: of the second one, which has `bases` bases.
    """
    known, places = anchors
    starts = range(0, len(codes) + K - length, length) if min(len(known), bases // length) else ()
    for start in starts:
        own = np.arange(start, start + length - K + 1, STEP)
        found = np.searchsorted(known, codes[own]).clip(max=len(known) - 1)
        same = known[found] == codes[own]
        offsets = places[found[same]] - own[same]
        offset = int(np.median(offsets)) if len(offsets) else 0
        if (abs(offsets - offset) < length // 8).sum() >= LEAST_SHARED * len(own):
            yield start, min(max(start + offset, 0), bases - length)


def _codes(text: str) -> np.ndarray:
    """Returns the number of each run of K bases, int64 `[len(text) - K + 1]`."""
    digits = np.zeros(256, np.int64)
    digits[list(b"ACGT")] = range(4)
    bases = digits[np.frombuffer(text.encode(), np.uint8)]
    codes = np.zeros(len(bases) - K + 1, np.int64)
    for place in range(K):
        codes = codes * 4 + bases[place : place + len(codes)]
    return codes


def _once(codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the codes that occur once, ascending, and their places."""
    known, places, counts = np.unique(codes, return_index=True, return_counts=True)
    return known[counts == 1], places[counts == 1]

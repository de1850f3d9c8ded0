"""Documents that are nearly the same, found by MinHash (Broder 1997) with the package datasketch.

The similarity of two documents is the Jaccard index of their sets of shingles, the sequences of SHINGLE consecutive
words: the number of shingles in both documents, divided by the number in at least one. MinHash estimates it with an
error of about 1 / sqrt(PERMUTATIONS).
"""

import importlib.util
from collections.abc import Iterable

from ..errors import CorpusError

SHINGLE = 5
PERMUTATIONS = 128


def check_installed(threshold: float) -> None:
    """Raises CorpusError if datasketch is not installed."""
    if importlib.util.find_spec("datasketch") is None:
        raise CorpusError(
            f"data.source.near_duplicates={threshold}: must be null without the package datasketch;"
            " pip install 'farsight[near-duplicates]' adds it"
        )


def first_of_group(texts: Iterable[str], threshold: float) -> list[int]:
    """Returns the index of the first text in the group of each text. Two texts are in one group if their similarity is
    at least `threshold`, or if a chain of such pairs connects them. An empty text is a group of its own."""
    from datasets.utils import tqdm
    from datasketch import MinHash, MinHashLSH

    index, sketches, first = MinHashLSH(threshold, PERMUTATIONS), {}, []
    for number, text in enumerate(tqdm(texts, desc="compare documents", unit=" documents", delay=2)):
        first.append(number)
        words = text.split()
        if not words:
            continue
        shingles = {" ".join(words[i : i + SHINGLE]).encode() for i in range(max(1, len(words) - SHINGLE + 1))}
        sketch = MinHash(PERMUTATIONS)
        sketch.update_batch(shingles)
        similar = [other for other in index.query(sketch) if sketch.jaccard(sketches[other]) >= threshold]
        groups = {_root(first, other) for other in similar}
        for group in groups:
            first[group] = min(groups)
        first[number] = min(groups, default=number)
        index.insert(number, sketch)
        sketches[number] = sketch
    return [_root(first, number) for number in range(len(first))]


def _root(first: list[int], number: int) -> int:
    while first[number] != number:
        number = first[number]
    return number

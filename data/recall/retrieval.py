"""A question about one of many documents, in sequences of real documents end to end.

A sequence holds excerpts of documents, each below a header with a number: "Document 48213:". At the end it quotes a
passage that occurs once, and the answer is the number of the document that holds it. Numbers are drawn anew for each
sequence, so a model finds the answer only in the header.
"""

from collections.abc import Iterator
from typing import Annotated

import numpy as np
from pydantic import Field

from ..collation import Batch
from ..errors import CorpusError
from ..tokenizers import Tokenizer
from .haystack import Material, to_batch

Count = Annotated[int, Field(ge=1)]

HEADER = "\nDocument", ":\n"
"""The text before and behind the number of a document."""
QUESTION = "\nThe passage\n", "\nis in document"
"""The text before and behind the quoted passage."""

LONGEST_NUMBER = 6
"""Tokens of a number with the space before it, at most: one for each byte."""

TRIES = 100


def retrieval(
    material: Material,
    length: int,
    generator: np.random.Generator,
    *,
    distance: int | None = None,
    excerpt: Count,
    passage: Count,
) -> Batch:
    """Documents end to end, and at the end a question for the number of the document that holds a quoted passage.

    distance: the number of tokens from the first token of that number in the header to the first token of the answer;
        None draws it log-uniformly.
    excerpt: the maximum number of tokens of a document; a longer one is cut to a section from a random place.
    passage: the number of tokens of the passage.
    """
    if passage > excerpt:
        raise CorpusError(f"passage={passage}: must be at most excerpt={excerpt}")
    numbers = _numbers(generator)
    number = next(numbers)
    before, behind = (_encode(material.tokenizer, text) for text in HEADER)
    answer = _encode(material.tokenizer, number)
    nearest, farthest = distances_that_fit(material.tokenizer, length, passage, len(answer))
    if nearest > farthest:
        raise CorpusError(f"length={length}: must be at least {length + nearest - farthest} tokens for this task")
    if distance is None:
        distance = round(np.exp(generator.uniform(np.log(nearest), np.log(farthest))))
    if not nearest <= distance <= farthest:
        raise CorpusError(f"distance={distance}: must be {nearest} to {farthest} for length={length}")
    header = np.concatenate([before, answer, behind])
    questions = [_encode(material.tokenizer, text) for text in QUESTION]
    ahead = farthest - distance  # tokens of the documents before the one that is asked for
    # tokens of its text and of the documents after it
    room = length - len(answer) - ahead - len(header) - sum(map(len, questions)) - passage
    for _ in range(TRIES):
        document = _excerpt(material, generator, min(excerpt, room))
        if len(document) < passage:
            continue
        fillers = [_documents(material, generator, numbers, excerpt, count) for count in (ahead, room - len(document))]
        context = np.concatenate([fillers[0], header, document, fillers[1]])
        place = int(generator.integers(len(document) - passage + 1))
        quoted = document[place : place + passage]
        if _occurrences(context, quoted) == 1:
            bos = np.array([material.tokenizer.bos])
            sequence = np.concatenate([bos, context, questions[0], quoted, questions[1], answer])
            return to_batch(sequence, np.arange(len(sequence)) >= len(sequence) - len(answer))
    raise CorpusError(
        f"passage={passage}: must be a length of which most documents have passages that occur once in {length} tokens"
    )


def distances_that_fit(
    tokenizer: Tokenizer, length: int, passage: int, number: int = LONGEST_NUMBER
) -> tuple[int, int]:
    """Returns the shortest and the longest distance of `retrieval` in sequences of `length` tokens.

    number: tokens of the document's number.
    """
    before, behind, *question = (len(_encode(tokenizer, text)) for text in (*HEADER, *QUESTION))
    return number + behind + passage + sum(question) + passage, length - number - before


def _numbers(generator: np.random.Generator) -> Iterator[str]:
    """Yields different numbers, each with a space before it."""
    drawn = set()
    while True:
        number = int(generator.integers(10_000, 100_000))
        if number not in drawn:
            drawn.add(number)
            yield f" {number}"


def _documents(
    material: Material, generator: np.random.Generator, numbers: Iterator[str], excerpt: int, count: int
) -> np.ndarray:
    """Returns `count` tokens of documents end to end; the last one is cut."""
    before, behind = (_encode(material.tokenizer, text) for text in HEADER)
    found = [np.empty(0, dtype=np.int64)]
    missing = count
    while missing > 0:
        number = _encode(material.tokenizer, next(numbers))
        found += [before, number, behind, _excerpt(material, generator, excerpt)]
        missing -= sum(map(len, found[-4:]))
    return np.concatenate(found)[:count]


def _excerpt(material: Material, generator: np.random.Generator, longest: int) -> np.ndarray:
    """Returns at most `longest` tokens of a random document, int64, without bos."""
    document = int(generator.integers(len(material.starts)))
    start = int(material.starts[document])
    stop = int(material.starts[document + 1]) if document + 1 < len(material.starts) else len(material.haystack)
    start += int(generator.integers(max(stop - start - longest, 0) + 1))
    tokens = material.haystack[start : min(start + longest, stop)]
    return tokens[tokens != material.tokenizer.bos].astype(np.int64)


def _occurrences(tokens: np.ndarray, wanted: np.ndarray) -> int:
    places = np.flatnonzero(tokens[: len(tokens) - len(wanted) + 1] == wanted[0])
    for offset, token in enumerate(wanted):
        places = places[tokens[places + offset] == token]
    return len(places)


def _encode(tokenizer: Tokenizer, text: str) -> np.ndarray:
    return tokenizer.encode(text).astype(np.int64)

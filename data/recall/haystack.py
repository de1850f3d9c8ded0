"""Sequences of real text with inserted facts and questions.

The haystack is the text between the facts: tokens of real documents, usually those on which the model is evaluated.
Facts are inserted between its tokens, so that the sequence has exactly the length that was asked for.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch

from ..collation import NO_TARGET, Batch
from ..errors import CorpusError
from ..tokenizers import Tokenizer


@dataclass(frozen=True)
class Material:
    """The tokenizer and the haystack of recall tasks.

    haystack: integers `[tokens]` of text; bos is left out of sections of it.
    starts: integers `[documents]`, the index in `haystack` at which each document begins.
    """

    tokenizer: Tokenizer
    haystack: np.ndarray
    starts: np.ndarray = field(default_factory=lambda: np.zeros(1, dtype=np.int64))

    @staticmethod
    def of(tokenizer: Tokenizer, documents: Iterable[np.ndarray]) -> "Material":
        """Takes the tokens of `documents`, end to end, as the haystack. Raises CorpusError if there are none."""
        pieces = [tokens[tokens != tokenizer.bos].astype(np.int64) for tokens in documents]
        haystack = np.concatenate([*pieces, np.empty(0, dtype=np.int64)])
        if not len(haystack):
            raise CorpusError("haystack=[]: must be documents with text")
        return Material(tokenizer, haystack, np.cumsum([0, *map(len, pieces[:-1])]))


class Insertion(NamedTuple):
    """Text to insert after the fraction `depth` of the haystack. The tokens of `answer` are targets.

    Insertions of equal depth keep their order.
    """

    depth: float
    text: str
    answer: str = ""


def assemble(material: Material, length: int, generator: np.random.Generator, insertions: list[Insertion]) -> Batch:
    """Returns a batch of one sequence: bos, and the insertions in a random section of the haystack.

    Raises:
        CorpusError: the insertions do not fit into `length` tokens.
    """
    encode = material.tokenizer.encode
    encoded = [
        (insertion.depth, [encode(text).astype(np.int64) for text in (insertion.text, insertion.answer) if text])
        for insertion in sorted(insertions, key=lambda insertion: insertion.depth)
    ]
    room = length - sum(len(tokens) for _, texts in encoded for tokens in texts)
    if room < 0:
        raise CorpusError(f"length={length}: must be at least {length - room} tokens for this task")
    haystack = section(material, room, generator)
    sequence, is_target = [np.array([material.tokenizer.bos])], [np.zeros(1, dtype=bool)]
    used = 0
    for depth, texts in [*encoded, (1.0, [])]:
        place = round(depth * room)
        texts = [haystack[used:place], *texts]
        used = place
        for index, tokens in enumerate(texts):  # haystack, text, answer
            sequence.append(tokens)
            is_target.append(np.full(len(tokens), index == 2))
    return to_batch(np.concatenate(sequence), np.concatenate(is_target))


def section(material: Material, count: int, generator: np.random.Generator) -> np.ndarray:
    """Returns `count` tokens of the haystack from a random place on; after its end it starts again."""
    start, found, missing = int(generator.integers(len(material.haystack))), [np.empty(0, dtype=np.int64)], count
    while missing:
        tokens = np.take(material.haystack, np.arange(start, start + missing), mode="wrap")
        start += missing
        found.append(tokens[tokens != material.tokenizer.bos].astype(np.int64))
        missing -= len(found[-1])
    return np.concatenate(found)


def to_batch(sequence: np.ndarray, is_target: np.ndarray) -> Batch:
    """Returns a batch of one sequence of `len(sequence) - 1` tokens; the last token of `sequence` is only a target."""
    targets = np.where(is_target[1:], sequence[1:], NO_TARGET)
    position = np.arange(len(targets), dtype=np.int32)
    arrays = {"tokens": sequence[:-1], "targets": targets, "document": np.zeros_like(position), "position": position}
    return {name: torch.from_numpy(np.ascontiguousarray(array))[None] for name, array in arrays.items()}

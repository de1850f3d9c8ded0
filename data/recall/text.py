"""Recall tasks in text, under any tokenizer: for models that were trained on text.

    passkey              a number hidden at one depth of the text, asked for at the end (Mohtashami and Jaggi 2023)
    needles              several keys, or several numbers of one key, asked for at the end (RULER, Hsieh et al. 2024)
    associative_recall   pairs at the beginning, asked for again and again in the second half (MQAR, Arora et al. 2023)
    variable_tracking    a chain of assignments: who has the value of the first? (RULER)
    common_words         which words come most often? (RULER)
    copy                 random tokens that come again `distance` tokens later

The text around is the `haystack`: tokens of real documents, best of those that the model is evaluated on. Facts are cut
in between its tokens, so that the sequence has exactly the length that was asked for. Nothing here asks for obedience:
every question is a sentence whose continuation is the answer, which a base model can give.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, NamedTuple

import numpy as np
import torch
from pydantic import Field

from ..errors import CorpusError
from ..packing import NO_TARGET, Batch
from ..tokenizers import Tokenizer

WORDS = (
    *("apple", "anchor", "arrow", "basket", "beacon", "bridge", "butter", "button", "camera", "candle", "canyon"),
    *("carpet", "castle", "cherry", "circle", "copper", "cotton", "desert", "dragon", "engine", "falcon", "feather"),
    *("forest", "garden", "ginger", "guitar", "hammer", "harbor", "helmet", "island", "jacket", "jungle", "kettle"),
    *("ladder", "lantern", "lemon", "magnet", "marble", "meadow", "mirror", "needle", "ocean", "orange", "oyster"),
    *("pencil", "pepper", "pillow", "planet", "pocket", "rabbit", "ribbon", "river", "saddle", "salmon", "shadow"),
    *("silver", "spider", "temple", "thunder", "ticket", "tunnel", "turtle", "velvet", "violin", "window", "winter"),
)
"""Keys: words that no text needs to explain."""

Count = Annotated[int, Field(ge=1)]
Words = Annotated[int, Field(ge=1, le=len(WORDS))]
"""A number of different words."""
Hops = Annotated[int, Field(ge=1, le=len(WORDS) - 1)]


@dataclass(frozen=True)
class Material:
    """What tasks are made of. `haystack`: integers, tokens of text without any bos."""

    tokenizer: Tokenizer
    haystack: np.ndarray

    @staticmethod
    def of(tokenizer: Tokenizer, documents: Iterable[np.ndarray]) -> "Material":
        """With the tokens of these documents, end to end, as the haystack. CorpusError: they hold none."""
        pieces = [tokens[tokens != tokenizer.bos].astype(np.int64) for tokens in documents]
        haystack = np.concatenate([*pieces, np.empty(0, dtype=np.int64)])
        if not len(haystack):
            raise CorpusError("haystack=[]: must be documents with text")
        return Material(tokenizer, haystack)


class _Part(NamedTuple):
    """Text to be cut into the haystack after the fraction `depth` of its tokens; parts of one depth keep their order.
    Of `question` and `answer`, the answer's tokens are scored."""

    depth: float
    question: str
    answer: str = ""


def passkey(material: Material, length: int, generator: np.random.Generator, *, depth: float) -> Batch:
    """`depth`: 0 hides the pass key at the beginning, 1 right before the question."""
    key = _number(generator)
    fact = f"\nThe pass key is {key}. Remember it. {key} is the pass key.\n"
    question = "\nWhat is the pass key? The pass key is"
    return _assemble(material, length, generator, [_Part(depth, fact), _Part(1.0, question, f" {key}")])


def needles(
    material: Material, length: int, generator: np.random.Generator, *, keys: Words, values: Count, queries: Words
) -> Batch:
    """`keys` words with `values` numbers each, all hidden at random depths; at the end `queries` of the words are asked
    for, and their numbers, in the order of the text, are the answer."""
    if queries > keys:
        raise CorpusError(f"queries={queries}: must be at most keys={keys}")
    words, numbers = _words(generator, keys), [[_number(generator) for _ in range(values)] for _ in range(keys)]
    parts = []
    for word, own in zip(words, numbers, strict=True):
        depths = np.sort(generator.uniform(0, 1, values))
        parts += [_Part(d, f"\nThe special number for {word} is {n}.\n") for d, n in zip(depths, own, strict=True)]
    plural = "s for {} are" if values > 1 else " for {} is"
    for index in generator.permutation(keys)[:queries]:
        parts.append(_Part(1.0, "\nThe special number" + plural.format(words[index]), f" {', '.join(numbers[index])}"))
    return _assemble(material, length, generator, parts)


def associative_recall(material: Material, length: int, generator: np.random.Generator, *, pairs: Words) -> Batch:
    """`pairs` words with a number each at the beginning; in the second half of the text each is asked for once, one of
    them at its end."""
    words, numbers = _words(generator, pairs), [_number(generator) for _ in range(pairs)]
    parts = [_Part(0.0, f"\n{word} = {number}") for word, number in zip(words, numbers, strict=True)]
    depths = [*np.sort(generator.uniform(0.5, 1, pairs - 1)), 1.0]
    for index, depth in zip(generator.permutation(pairs), depths, strict=True):
        parts.append(_Part(depth, f"\n{words[index]} =", f" {numbers[index]}"))
    return _assemble(material, length, generator, parts)


def variable_tracking(material: Material, length: int, generator: np.random.Generator, *, hops: Hops) -> Batch:
    """A variable with a value, and `hops` variables that get it from one another; the answer names them in order."""
    words, value = _words(generator, hops + 1), _number(generator)
    depths = np.sort(generator.uniform(0, 1, hops + 1))
    sources = [value, *words[:-1]]
    parts = [_Part(d, f"\nVAR {w} = {s}\n") for d, w, s in zip(depths, words, sources, strict=True)]
    question = f"\nThe variables that have the value {value}, in the order of their assignment, are"
    return _assemble(material, length, generator, [*parts, _Part(1.0, question, f" {', '.join(words)}")])


def common_words(material: Material, length: int, generator: np.random.Generator, *, common: Words) -> Batch:
    """A list of words as long as the text; the `common` most frequent ones, the most frequent first, are the answer."""
    words = _words(generator, len(WORDS))
    # The common ones take half the list, in shares of common, ..., 2, 1; no other word comes near the last of them.
    shares = np.arange(common, 0, -1) / np.arange(1, common + 1).sum() / 2
    weights = np.concatenate([shares, np.full(len(words) - common, 0.5 / (len(words) - common))])
    question = f"\nThe {common} most common words in the list, the most common first, are"
    answer = f" {', '.join(words[:common])}"
    head = "\nA list of words:"
    room = length + 1 - sum(len(material.tokenizer.encode(text)) for text in (head, question, answer)) - 1
    longest = max(len(material.tokenizer.encode(f" {word}")) for word in words)
    count = room // longest
    shortest = 20 * common
    if count < shortest:
        least = length - room + shortest * longest
        raise CorpusError(f"length={length}: must be at least {least} tokens, for a list that shows common={common}")
    # Rounded shares instead of draws: the order of the answer is certain.
    times = np.maximum(np.floor(weights * count), 1).astype(int)
    listed = generator.permutation(np.repeat(np.arange(len(words)), times))
    body = head + "".join(f" {words[index]}" for index in listed)
    return _assemble(material, length, generator, [_Part(1.0, body), _Part(1.0, question, answer)])


def copy(
    material: Material, length: int, generator: np.random.Generator, *, distance: int, cue: Count, size: Count
) -> Batch:
    """`cue + size` random tokens, the haystack, and at the end the same tokens again: the cue is given, the rest is the
    answer. What a token of the answer repeats lies `distance` tokens before it. Raises CorpusError where original and
    copy overlap or do not fit."""
    total = cue + size
    if length < 2 * total:
        raise CorpusError(f"length={length}: must be at least {2 * total}, for twice cue={cue} and size={size}")
    if not total <= distance <= length - total:
        fitting = f"{total} to {length - total} for length={length}"
        raise CorpusError(f"distance={distance}: must be {fitting}")
    real = np.flatnonzero(material.tokenizer.token_bytes)
    segment = generator.choice(real, total)
    haystack = _cut(material, length - 2 * total, generator)
    before = len(haystack) - (distance - total)
    sequence = np.concatenate([[material.tokenizer.bos], haystack[:before], segment, haystack[before:], segment])
    scored = np.zeros(length + 1, dtype=bool)
    scored[-size:] = True
    return _batch(sequence, scored)


TASKS = (passkey, needles, associative_recall, variable_tracking, common_words, copy)


def _assemble(material: Material, length: int, generator: np.random.Generator, parts: list[_Part]) -> Batch:
    """bos, and `length` tokens of haystack with the parts in it; the last is only a target."""
    encode = material.tokenizer.encode
    pieces = [
        (part.depth, [encode(text).astype(np.int64) for text in (part.question, part.answer) if text])
        for part in sorted(parts, key=lambda part: part.depth)
    ]
    room = length - sum(len(tokens) for _, texts in pieces for tokens in texts)
    if room < 0:
        raise CorpusError(f"length={length}: must be at least {length - room} tokens for this task")
    haystack = _cut(material, room, generator)
    sequence, scored = [np.array([material.tokenizer.bos])], [np.zeros(1, dtype=bool)]
    used = 0
    for depth, texts in [*pieces, (1.0, [])]:
        place = round(depth * room)
        texts = [haystack[used:place], *texts]
        used = place
        for index, tokens in enumerate(texts):
            sequence.append(tokens)
            scored.append(np.full(len(tokens), index == 2))
    return _batch(np.concatenate(sequence), np.concatenate(scored))


def _cut(material: Material, count: int, generator: np.random.Generator) -> np.ndarray:
    """`count` tokens of the haystack from a random place on, round its end where it is short."""
    start = int(generator.integers(len(material.haystack)))
    return np.take(material.haystack, np.arange(start, start + count), mode="wrap")


def _batch(sequence: np.ndarray, scored: np.ndarray) -> Batch:
    """A batch of one sequence of `len(sequence) - 1` tokens."""
    targets = np.where(scored[1:], sequence[1:], NO_TARGET)
    position = np.arange(len(targets), dtype=np.int32)
    arrays = {"tokens": sequence[:-1], "targets": targets, "document": np.zeros_like(position), "position": position}
    return {name: torch.from_numpy(np.ascontiguousarray(array))[None] for name, array in arrays.items()}


def _number(generator: np.random.Generator) -> str:
    return str(generator.integers(10_000, 100_000))


def _words(generator: np.random.Generator, count: int) -> list[str]:
    if count > len(WORDS):
        raise CorpusError(f"words={count}: must be at most {len(WORDS)}")
    return [WORDS[index] for index in generator.permutation(len(WORDS))[:count]]

"""Recall tasks over token ids, for models that a test trains.

    associative_recall   key-value pairs, and later questions for their values (MQAR of Zoology, Arora et al. 2023)
    needle               one key-value pair in noise, and at the end a question for the value

Keys, values and noise have disjoint ranges of token ids (`alphabet`), so that no noise resembles a key or a value. The
tokens of an answer follow its question in the sequence and are the only targets.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from data.collation import NO_TARGET, Batch

BOS = 0
"""The first token of every sequence."""


class Alphabet(NamedTuple):
    """Disjoint ranges of token ids."""

    keys: range
    values: range
    noise: range


def alphabet(vocabulary: int) -> Alphabet:
    """Divides the ids from 2 on into thirds of keys, values and noise."""
    first, third = 2, (vocabulary - 2) // 3
    return Alphabet(
        range(first, first + third), range(first + third, first + 2 * third), range(first + 2 * third, vocabulary)
    )


def associative_recall(
    batch: int, length: int, *, pairs: int, vocabulary: int, generator: torch.Generator, min_distance: int = 2
) -> Batch:
    """`pairs` different keys with their values at the beginning; then, in noise, each key once more with its value.

    min_distance: the fewest tokens between a key and its question; more than `layers * window` puts every answer beyond
    the reach of windows.
    """
    ids = alphabet(vocabulary)
    first = 1 + 2 * (pairs - 1) + min_distance  # from here on, every key is far enough away
    room = (length + 1 - first) // 2  # places for two tokens, a key and its value
    assert pairs <= len(ids.keys) and pairs <= room

    sequence = _noise(batch, length, ids, generator)
    keys = ids.keys.start + _choose(batch, len(ids.keys), pairs, generator)
    values = _draw(ids.values, (batch, pairs), generator)
    sequence[:, 1 : 1 + 2 * pairs] = torch.stack([keys, values], -1).flatten(1)
    asked = _choose(batch, pairs, pairs, generator)
    questions = first + 2 * _choose(batch, room, pairs, generator)
    sequence.scatter_(1, questions, keys.gather(1, asked))
    sequence.scatter_(1, questions + 1, values.gather(1, asked))
    return _batch(sequence, questions)


def needle(batch: int, length: int, *, vocabulary: int, generator: torch.Generator, size: int = 1) -> Batch:
    """A key and its value of `size` tokens at a random place in noise; at the end the key and the value once more."""
    ids = alphabet(vocabulary)
    question = length - size
    last = question - size - 1
    position = _draw(range(1, last + 1), (batch,), generator)

    sequence = _noise(batch, length, ids, generator)
    key = _draw(ids.keys, (batch, 1), generator)
    value = _draw(ids.values, (batch, size), generator)
    fact = torch.cat([key, value], 1)
    sequence.scatter_(1, position[:, None] + torch.arange(size + 1), fact)
    sequence[:, question:] = fact
    return _batch(sequence, question + torch.arange(size).expand(batch, -1))


def _noise(batch: int, length: int, ids: Alphabet, generator: torch.Generator) -> Tensor:
    """int64 `[batch, length + 1]`: BOS and noise; the last token is only a target."""
    sequence = _draw(ids.noise, (batch, length + 1), generator)
    sequence[:, 0] = BOS
    return sequence


def _batch(sequence: Tensor, questions: Tensor) -> Batch:
    """The batch in which the tokens after `questions`, int64 `[batch, answers]`, are the targets."""
    tokens, following = sequence[:, :-1], sequence[:, 1:]
    targets = torch.full_like(following, NO_TARGET).scatter_(1, questions, following.gather(1, questions))
    position = torch.arange(tokens.shape[1], dtype=torch.int32).repeat(len(tokens), 1)
    return {
        "tokens": tokens.contiguous(),
        "targets": targets,
        "document": torch.zeros_like(position),
        "position": position,
    }


def _draw(ids: range, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.randint(ids.start, ids.stop, shape, generator=generator)


def _choose(batch: int, population: int, count: int, generator: torch.Generator) -> Tensor:
    """int64 `[batch, count]`: different numbers below `population` in random order."""
    return torch.rand(batch, population, generator=generator).argsort(1)[:, :count]

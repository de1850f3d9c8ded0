"""Recall tasks over token ids, for models that are trained on them.

    associative_recall   many key-value pairs, later asked for (MQAR of Zoology, Arora et al. 2023)
    needle               one key with its value in a haystack, asked for at the end (also the passkey task)
    copy                 a segment that comes again `distance` tokens later

The vocabulary is cut in fixed parts (`alphabet`), so that no noise looks like a key, a value or a marker. An answer
follows its question in the sequence as it does in text: the target is the next token, and greedy decoding of a question
gives the answer if and only if every target is the arg max of its logits.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..errors import CorpusError
from ..packing import NO_TARGET

BOS, MARKER = 0, 1
"""The first token of every sequence, and what stands before the original and the copy of a segment."""

SMALLEST_VOCABULARY = 8

Batch = dict[str, Tensor]


class Alphabet(NamedTuple):
    """Disjoint ranges of token ids."""

    keys: range
    values: range
    noise: range


def alphabet(vocabulary: int) -> Alphabet:
    """How the tasks use the ids below `vocabulary`: BOS, MARKER, then a third each of keys, values and noise."""
    if vocabulary < SMALLEST_VOCABULARY:
        raise CorpusError(f"vocabulary={vocabulary}: accepted is a whole number of at least {SMALLEST_VOCABULARY}")
    first, third = MARKER + 1, (vocabulary - MARKER - 1) // 3
    return Alphabet(
        range(first, first + third), range(first + third, first + 2 * third), range(first + 2 * third, vocabulary)
    )


def associative_recall(
    batch: int,
    length: int,
    *,
    pairs: int,
    vocabulary: int,
    generator: torch.Generator,
    queries: int | None = None,
    min_distance: int = 2,
) -> Batch:
    """Multi-query associative recall: `pairs` pairs of a key and its value at the beginning, noise, and among the noise
    `queries` of the keys (null: each), each followed by its value, the target.

    No key comes twice before it is asked, and none is asked twice. `min_distance`: tokens between a key and its query
    at least, so that a reach of `layers * window` can be exceeded by every query. Raises CorpusError where the sequence
    has no room or the vocabulary not enough keys.
    """
    parts = alphabet(vocabulary)
    queries = pairs if queries is None else queries
    _require(1 <= pairs <= len(parts.keys), "pairs", pairs, f"1 to {len(parts.keys)} for vocabulary={vocabulary}")
    _require(1 <= queries <= pairs, "queries", queries, f"1 to pairs={pairs}")
    _require(min_distance >= 2, "min_distance", min_distance, "a whole number of at least 2")
    first = 1 + 2 * (pairs - 1) + min_distance  # from here on, every key is far enough away
    room = (length + 1 - first) // 2  # a query and its value take a slot of two tokens
    _require(
        room >= queries, "length", length, f"at least {first + 2 * queries - 1} for these pairs, queries, min_distance"
    )

    sequence = _haystack(batch, length, parts, generator)
    keys = parts.keys.start + _choose(batch, len(parts.keys), pairs, generator)
    values = _draw(parts.values, (batch, pairs), generator)
    sequence[:, 1 : 1 + 2 * pairs] = torch.stack([keys, values], -1).flatten(1)
    asked = _choose(batch, pairs, queries, generator)
    where = first + 2 * _choose(batch, room, queries, generator)
    sequence.scatter_(1, where, keys.gather(1, asked))
    sequence.scatter_(1, where + 1, values.gather(1, asked))
    return _batch(sequence, where)


def needle(
    batch: int,
    length: int,
    *,
    vocabulary: int,
    generator: torch.Generator,
    position: int | Tensor | None = None,
    size: int = 1,
) -> Batch:
    """A key and its value of `size` tokens, hidden in noise at `position`; the sequence ends with the key once more,
    and the value, the targets.

    `position`: of the key, for all sequences or int64 `[batch]`; null: anywhere, drawn for each. Raises CorpusError for
    a position at which the needle does not lie between the first token and the question.
    """
    parts = alphabet(vocabulary)
    _require(size >= 1, "size", size, "a whole number of at least 1")
    question = length - size  # the question's key; its answer is the tokens after it
    last = question - size - 1
    _require(last >= 1, "length", length, f"at least {2 * size + 2} for size={size}")
    if position is None:
        position = _draw(range(1, last + 1), (batch,), generator)
    position = torch.as_tensor(position).expand(batch)
    outside = position[(position < 1) | (position > last)]
    _require(not len(outside), "position", outside[:1].tolist(), f"1 to {last} for length={length}, size={size}")

    sequence = _haystack(batch, length, parts, generator)
    key = _draw(parts.keys, (batch, 1), generator)
    value = _draw(parts.values, (batch, size), generator)
    fact = torch.cat([key, value], 1)
    sequence.scatter_(1, position[:, None] + torch.arange(size + 1), fact)
    sequence[:, question:] = fact
    return _batch(sequence, question + torch.arange(size).expand(batch, -1))


def copy(
    batch: int,
    length: int,
    *,
    size: int,
    distance: int,
    vocabulary: int,
    generator: torch.Generator,
) -> Batch:
    """MARKER and `size` random values, noise, and at the sequence's end MARKER and the same values again, the targets.

    `distance`: tokens from an original to its copy: what a copied token needs lies exactly `distance - 1` before the
    token that predicts it. Raises CorpusError where original and copy overlap or do not fit.
    """
    parts = alphabet(vocabulary)
    _require(size >= 1, "size", size, "a whole number of at least 1")
    question = length - size
    _require(
        size + 1 <= distance <= question - 1,
        "distance",
        distance,
        f"{size + 1} to {question - 1} for length={length}, size={size}",
    )
    sequence = _haystack(batch, length, parts, generator)
    segment = torch.cat([torch.full((batch, 1), MARKER), _draw(parts.values, (batch, size), generator)], 1)
    for start in (question - distance, question):
        sequence[:, start : start + size + 1] = segment
    return _batch(sequence, question + torch.arange(size).expand(batch, -1))


class Samples(Dataset):
    """A task as a map-style dataset of `count` sequences; sample `i` is a pure function of (seed, i).

    task: called as `task(1, generator=...)`: `functools.partial(needle, length=1024, vocabulary=64)`.
    """

    def __init__(self, task: Callable[..., Batch], count: int, seed: int) -> None:
        self.task, self.count, self.seed = task, count, seed

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Batch:
        if not 0 <= index < self.count:
            raise IndexError(index)
        state = np.random.SeedSequence((self.seed, index)).generate_state(1)  # a Generator takes 32 bits of its seed
        generator = torch.Generator().manual_seed(int(state[0]))
        return {name: tensor[0] for name, tensor in self.task(1, generator=generator).items()}


def _haystack(batch: int, length: int, parts: Alphabet, generator: torch.Generator) -> Tensor:
    """int64 `[batch, length + 1]`: BOS and noise; the last token is only a target."""
    sequence = _draw(parts.noise, (batch, length + 1), generator)
    sequence[:, 0] = BOS
    return sequence


def _batch(sequence: Tensor, questions: Tensor) -> Batch:
    """The batch in which the tokens after `questions`, int64 `[batch, answers]`, are scored."""
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
    """int64 `[batch, count]`: distinct numbers below `population` in random order."""
    return torch.rand(batch, population, generator=generator).argsort(1)[:, :count]


def _require(condition: bool, name: str, value: object, accepted: str) -> None:
    if not condition:
        raise CorpusError(f"{name}={value}: accepted is {accepted}")

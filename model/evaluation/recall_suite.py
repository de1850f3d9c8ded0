"""The recall suite: asks one model many questions, and sums up its answers by task, length, depth and distance.

A case is one task at one length, with `where` the answer lies: {"depth": fraction of the sequence}, {"distance": tokens
back}, or {} where the task itself decides.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from model.evaluation.recall import Answer, answer
from model.evaluation.scoring import Progress
from model.evaluation.statistics import share_bounds
from model.transformer import Transformer

SHORTEST = 1024
"""Tokens of the shortest sequence where no lengths are given."""
STEP = 4
"""The factor between two lengths where none are given: each length takes as many sequences, so tokens grow with it."""


@dataclass(frozen=True)
class Case:
    """Questions of one kind: `length` is the number of tokens of a sequence."""

    task: str
    length: int
    where: Mapping[str, float]


Task = Callable[[Case, np.random.Generator], Mapping[str, Tensor]]
"""Makes one sequence of a case: tokens, targets and position, `[1, length]`."""


def default_lengths(longest: int) -> list[int]:
    """Returns SHORTEST, STEP times that, ..., up to `longest`; or `longest` alone where that is shorter."""
    lengths = [SHORTEST * STEP**power for power in range(longest.bit_length()) if SHORTEST * STEP**power < longest]
    return [*lengths, longest]


def default_distances(model: Transformer, length: int, size: int) -> list[int]:
    """Returns the distances on both sides of each edge of the model's patterns and of the reach of all its layers; half
    of the length; and the longest that fits. `size`: tokens of a question with its answer.

    An edge of e tokens, as the width of a window, hides the token that follows the copied one from a distance of e + 1
    on.
    """
    plan, layers = model.plan, model.config.layers
    edges: set[int] = set()
    for pattern in plan.patterns.values():
        edges |= {*pattern.edges, *(layers * edge for edge in pattern.edges)}
    around = {edge + step for edge in edges for step in (0, 1)}
    return sorted(d for d in around | {length // 2, length - size} if size <= d <= length - size)


def octaves(nearest: int, farthest: int) -> list[int]:
    """Returns `farthest`, its half, ..., down to `nearest` at the least, shortest first."""
    return [farthest >> halving for halving in reversed(range(farthest.bit_length())) if farthest >> halving >= nearest]


def ask(
    model: Transformer,
    case: Case,
    task: Task,
    *,
    samples: int,
    tokens_at_once: int,
    seed: int,
    vocabulary: int,
    progress: Progress,
) -> list[Answer]:
    """Returns the answers to `samples` sequences of a case, which depend on the seed, the case and the tokenizer alone.

    vocabulary: size of the tokenizer's; see recall.answer.
    """
    at_once = max(1, tokens_at_once // case.length)
    answers: list[Answer] = []
    for first in range(0, samples, at_once):
        numbers = range(first, min(first + at_once, samples))
        seeds = [(seed, case.length, *case.task.encode(), number) for number in numbers]
        sequences = [task(case, np.random.default_rng(each)) for each in seeds]
        batch = {name: torch.cat([sequence[name] for sequence in sequences]) for name in sequences[0]}
        answers += answer(model, batch, vocabulary)
        progress(case.length * len(sequences))
    return answers


def summarize_answers(case: Case, answers: Sequence[Answer]) -> dict[str, object]:
    """Returns a row of recall.json. `interval`: 95 % bounds of the share of exact answers, as if they were independent;
    `nll`: mean loss of an answer (nats); `nll_per_token`: mean loss of a token."""
    nats, tokens = sum(each.nll for each in answers), sum(each.tokens for each in answers)
    exact = sum(each.exact for each in answers)
    place = {"task": case.task, "length": case.length, "depth": None, "distance": None} | dict(case.where)
    return place | {
        "answers": len(answers),
        "exact_match": exact / len(answers),
        "interval": list(share_bounds(exact, len(answers))),
        "nll": nats / len(answers),
        "nll_per_token": nats / tokens,
    }


def exact_match_by_length(rows: Sequence[Mapping]) -> dict[int, float]:
    """Returns {length: share of exact answers} over all depths and distances."""
    lengths = dict.fromkeys(row["length"] for row in rows)
    of = {length: [row for row in rows if row["length"] == length] for length in lengths}
    return {
        length: sum(row["exact_match"] * row["answers"] for row in found) / sum(row["answers"] for row in found)
        for length, found in of.items()
    }

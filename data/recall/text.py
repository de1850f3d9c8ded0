"""Recall tasks in text, for models that were trained on text, with any tokenizer.

    passkey              a number at one depth of the text, asked for at the end (Mohtashami and Jaggi 2023)
    needles              several keys, or several numbers of a key, asked for at the end (RULER, Hsieh et al. 2024)
    associative_recall   pairs at the beginning, each asked for in the second half (MQAR, Arora et al. 2023)
    scattered            facts of these three tasks all over the text, each asked for once, near or far (for training)
    recurring            a few pairs, each asked for again and again, with little text between them (for training)
    variable_tracking    a chain of assignments, and a question for all variables of its value (RULER)
    common_words         a list of words, and a question for the most frequent ones (RULER)
    copy                 random tokens that repeat `distance` tokens later
    retrieval            documents end to end, and a passage of one of them, asked for at the end (retrieval.py)

No task needs a model that follows instructions: each question is a sentence that its answer completes.

Each task takes a Material (haystack.py), the length in tokens and a random generator, and returns a batch of one
sequence. Raises CorpusError if the task does not fit into the length.
"""

from typing import Annotated

import numpy as np
from pydantic import Field

from ..collation import Batch
from ..errors import CorpusError
from .haystack import Insertion, Material, assemble, section, to_batch
from .retrieval import retrieval

WORDS = (
    *("apple", "anchor", "arrow", "basket", "beacon", "bridge", "butter", "button", "camera", "candle", "canyon"),
    *("carpet", "castle", "cherry", "circle", "copper", "cotton", "desert", "dragon", "engine", "falcon", "feather"),
    *("forest", "garden", "ginger", "guitar", "hammer", "harbor", "helmet", "island", "jacket", "jungle", "kettle"),
    *("ladder", "lantern", "lemon", "magnet", "marble", "meadow", "mirror", "needle", "ocean", "orange", "oyster"),
    *("pencil", "pepper", "pillow", "planet", "pocket", "rabbit", "ribbon", "river", "saddle", "salmon", "shadow"),
    *("silver", "spider", "temple", "thunder", "ticket", "tunnel", "turtle", "velvet", "violin", "window", "winter"),
)
"""Common words that serve as keys."""

Count = Annotated[int, Field(ge=1)]
Words = Annotated[int, Field(ge=1, le=len(WORDS))]
"""A number of different words."""
Hops = Annotated[int, Field(ge=1, le=len(WORDS) - 1)]

NEAREST = 16
"""Tokens of the shortest distance that is drawn."""

RECURRING = 0.75
"""The share of a sequence that the lines of `recurring` take."""

WORDS_PER_COMMON = 20
"""The shortest list of `common_words`, for each common word: shorter ones could not show the order of frequencies."""


def passkey(material: Material, length: int, generator: np.random.Generator, *, depth: float | None = None) -> Batch:
    """A pass key at `depth`: 0 is the beginning of the text, 1 the place right before the question.

    Without a depth, its distance from the question is log-uniform.
    """
    key = _number(generator)
    fact, question = _passkey(key)
    depth = 1 - _distances(generator, length, 1)[0] if depth is None else depth
    return assemble(material, length, generator, [Insertion(depth, fact), Insertion(1.0, question, f" {key}")])


def needles(
    material: Material,
    length: int,
    generator: np.random.Generator,
    *,
    keys: Words,
    values: Count,
    queries: Words | None = None,
) -> Batch:
    """`keys` words with `values` numbers each, all at random depths, and at the end questions for `queries` of them, or
    for all.

    An answer lists the numbers of a word in the order of the text.
    """
    queries = keys if queries is None else queries
    if queries > keys:
        raise CorpusError(f"queries={queries}: must be at most keys={keys}")
    words, numbers = _words(generator, keys), [[_number(generator) for _ in range(values)] for _ in range(keys)]
    insertions = []
    for word, own in zip(words, numbers, strict=True):
        depths = np.sort(generator.uniform(0, 1, values))
        for depth, number in zip(depths, own, strict=True):
            insertions.append(Insertion(depth, _needle(word, number)[0]))
    plural = "s for {} are" if values > 1 else " for {} is"
    for index in generator.permutation(keys)[:queries]:
        question, answer = plural.format(words[index]), f" {', '.join(numbers[index])}"
        insertions.append(Insertion(1.0, f"\nThe special number{question}", answer))
    return assemble(material, length, generator, insertions)


def associative_recall(material: Material, length: int, generator: np.random.Generator, *, pairs: Words) -> Batch:
    """`pairs` words with a number each at the beginning, and in the second half one question for each.

    One of the questions is at the very end.
    """
    words, numbers = _words(generator, pairs), [_number(generator) for _ in range(pairs)]
    insertions = [Insertion(0.0, _pair(word, number)[0]) for word, number in zip(words, numbers, strict=True)]
    depths = [*np.sort(generator.uniform(0.5, 1, pairs - 1)), 1.0]
    for index, depth in zip(generator.permutation(pairs), depths, strict=True):
        insertions.append(Insertion(depth, _pair(words[index], numbers[index])[1], f" {numbers[index]}"))
    return assemble(material, length, generator, insertions)


def scattered(material: Material, length: int, generator: np.random.Generator, *, spacing: Count) -> Batch:
    """`length / spacing` facts at random places, and a question for each fact at a log-uniform distance after it.

    Facts are worded as in `associative_recall` or `needles`; one of them is a pass key, which is asked for at the end.
    This task teaches the others: it has many answers in a sequence, and equally many at each octave of distance.
    """
    count = max(1, length // spacing)
    numbers = [_number(generator) for _ in range(count)]
    wordings = [_passkey(numbers[0])]
    for index, (word, number) in enumerate(zip(_keys(generator, count - 1), numbers[1:], strict=True)):
        wordings.append((_pair if index % 2 else _needle)(word, number))
    distances = _distances(generator, length, count)
    asked = distances + (1 - distances) * generator.uniform(0, 1, count)
    asked[0] = 1.0
    facts = [Insertion(place, fact) for place, (fact, _) in zip(asked - distances, wordings, strict=True)]
    questions = [
        Insertion(place, question, f" {number}")
        for place, (_, question), number in zip(asked, wordings, numbers, strict=True)
    ]
    return assemble(material, length, generator, [*facts, *questions[1:], questions[0]])


def recurring(material: Material, length: int, generator: np.random.Generator, *, keys: Words) -> Batch:
    """Lines of `keys` pairs in random order. The first line of a word is a fact, and each later one is a question.

    This task starts the learning of all others: a third of its tokens are answers, and with one key, which need not be
    read, a model learns to copy numbers before it learns to choose between them.
    """
    words, numbers = _words(generator, keys), [_number(generator) for _ in range(keys)]
    wordings = [_pair(word, number) for word, number in zip(words, numbers, strict=True)]
    tokens_per_line = max(len(material.tokenizer.encode(fact)) for fact, _ in wordings)
    lines = max(2, int(RECURRING * length) // tokens_per_line)
    order = generator.integers(keys, size=lines)
    order[-1] = generator.choice(order[:-1])  # the last line is a question
    seen: set[int] = set()
    insertions = []
    for index, depth in zip(order.tolist(), [*np.sort(generator.uniform(0, 1, lines - 1)), 1.0], strict=True):
        fact, question = wordings[index]
        insertions.append(Insertion(depth, question, f" {numbers[index]}") if index in seen else Insertion(depth, fact))
        seen.add(index)
    return assemble(material, length, generator, insertions)


def variable_tracking(material: Material, length: int, generator: np.random.Generator, *, hops: Hops) -> Batch:
    """A variable with a value, then `hops` variables, each assigned from the one before. The answer lists them all."""
    words, value = _words(generator, hops + 1), _number(generator)
    depths = np.sort(generator.uniform(0, 1, hops + 1))
    sources = [value, *words[:-1]]
    insertions = [Insertion(d, f"\nVAR {w} = {s}\n") for d, w, s in zip(depths, words, sources, strict=True)]
    question = f"\nThe variables that have the value {value}, in the order of their assignment, are"
    return assemble(material, length, generator, [*insertions, Insertion(1.0, question, f" {', '.join(words)}")])


def common_words(material: Material, length: int, generator: np.random.Generator, *, common: Words) -> Batch:
    """A list of words as long as the text. The answer lists the `common` most frequent ones, most frequent first."""
    words = _words(generator, len(WORDS))
    # The common words fill half of the list, in proportions of common, ..., 2, 1. Every other word is much rarer.
    shares = np.arange(common, 0, -1) / np.arange(1, common + 1).sum() / 2
    weights = np.concatenate([shares, np.full(len(words) - common, 0.5 / (len(words) - common))])
    question = f"\nThe {common} most common words in the list, the most common first, are"
    answer = f" {', '.join(words[:common])}"
    head = "\nA list of words:"
    room = length - sum(len(material.tokenizer.encode(text)) for text in (head, question, answer))
    tokens_per_word = max(len(material.tokenizer.encode(f" {word}")) for word in words)
    count, fewest = room // tokens_per_word, WORDS_PER_COMMON * common
    if count < fewest:
        least = length - room + fewest * tokens_per_word
        raise CorpusError(f"length={length}: must be at least {least} tokens, for a list that shows common={common}")
    # Frequencies are rounded and not drawn, so that the order of the answer is certain.
    times = np.maximum(np.floor(weights * count), 1).astype(int)
    listed = generator.permutation(np.repeat(np.arange(len(words)), times))
    text = head + "".join(f" {words[index]}" for index in listed)
    return assemble(material, length, generator, [Insertion(1.0, text), Insertion(1.0, question, answer)])


def copy(
    material: Material,
    length: int,
    generator: np.random.Generator,
    *,
    distance: int | None = None,
    cue: Count,
    size: Count,
) -> Batch:
    """`cue + size` random tokens in the haystack, and at the end the same tokens again.

    The repeated cue is the question, and the `size` tokens after it are the answer. Each repeats the token that lies
    `distance` tokens before it. Without a distance, it is log-uniform.
    """
    total = cue + size
    if length < 2 * total:
        raise CorpusError(f"length={length}: must be at least {2 * total}, for twice cue={cue} and size={size}")
    if distance is None:
        distance = round(np.exp(generator.uniform(np.log(total), np.log(length - total))))
    if not total <= distance <= length - total:
        raise CorpusError(f"distance={distance}: must be {total} to {length - total} for length={length}")
    with_text = np.flatnonzero(material.tokenizer.token_bytes)
    segment = generator.choice(with_text, total)
    haystack = section(material, length - 2 * total, generator)
    before = len(haystack) - (distance - total)
    sequence = np.concatenate([[material.tokenizer.bos], haystack[:before], segment, haystack[before:], segment])
    is_target = np.zeros(length + 1, dtype=bool)
    is_target[-size:] = True
    return to_batch(sequence, is_target)


TASKS = (passkey, needles, associative_recall, scattered, recurring, variable_tracking, common_words, copy, retrieval)


def _passkey(key: str) -> tuple[str, str]:
    """Returns a fact and its question."""
    return (
        f"\nThe pass key is {key}. Remember it. {key} is the pass key.\n",
        "\nWhat is the pass key? The pass key is",
    )


def _needle(word: str, number: str) -> tuple[str, str]:
    return f"\nThe special number for {word} is {number}.\n", f"\nThe special number for {word} is"


def _pair(word: str, number: str) -> tuple[str, str]:
    return f"\n{word} = {number}", f"\n{word} ="


def _distances(generator: np.random.Generator, length: int, count: int) -> np.ndarray:
    """Returns log-uniform distances as fractions of `length`, float64 `[count]`: from NEAREST to `length` tokens.

    So each octave of distance has equally many questions. Of uniform distances only a few would be short, and a model
    learns short distances first.
    """
    return np.exp(generator.uniform(np.log(min(NEAREST / length, 1)), 0, count))


def _number(generator: np.random.Generator) -> str:
    return str(generator.integers(10_000, 100_000))


def _keys(generator: np.random.Generator, count: int) -> list[str]:
    """Returns `count` different keys: words, or pairs of words where there are too few words."""
    if count <= len(WORDS):
        return _words(generator, count)
    pairs = len(WORDS) * (len(WORDS) - 1)
    if count > pairs:
        raise CorpusError(f"facts={count}: must be at most {pairs}, the number of pairs of words; spacing sets it")
    chosen = generator.choice(pairs, count, replace=False)
    first, second = np.divmod(chosen, len(WORDS) - 1)
    second += second >= first
    return [f"{WORDS[one]} {WORDS[other]}" for one, other in zip(first, second, strict=True)]


def _words(generator: np.random.Generator, count: int) -> list[str]:
    if count > len(WORDS):
        raise CorpusError(f"words={count}: must be at most {len(WORDS)}")
    return [WORDS[index] for index in generator.permutation(len(WORDS))[:count]]

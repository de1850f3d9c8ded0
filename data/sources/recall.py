"""Recall tasks as training sequences, in the text of other documents."""

import inspect
import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from pydantic import Field, TypeAdapter, ValidationError

from ..errors import CorpusError
from .bad_documents import BadDocuments
from .base import GeneratingSource, Name, Source
from .files import Files
from .standard_library import StandardLibrary

if TYPE_CHECKING:
    from datasets import Dataset

    from ..collation import Batch
    from ..corpus import Split
    from ..tokenizers import Tokenizer

Weight = Annotated[float, Field(gt=0)]
FITS = 0.9
"""The share of a sequence into which a first draw of each task must fit: draws differ in their numbers of tokens, and
those that need more then still fit into the whole sequence."""

Values = Annotated[tuple[int | float, ...], Field(min_length=1)]


class Recall(GeneratingSource):
    """Text with facts, and with questions about them far later (data/recall/text.py).

    The text is that of the files below `path` (as `Files` reads them), or the standard library if it is None; in a
    mixture, it is that of the other sources.

    tasks: for each task its `weight`, the share of the sequences, and for each of its settings a list of values, from
        which every sequence draws one. None leaves a task out.
    targets: `answers`: only the tokens of answers are targets; `all`: all tokens are.
    text_column: of the tables below `path`, as `Files` reads them. Runs of earlier versions were saved without it.
    """

    def __init__(
        self,
        tasks: dict[str, dict[str, Weight | Values] | None],
        targets: Literal["answers", "all"],
        text_column: Name = "text",
    ):
        self.tasks = {name: dict(tasks[name]) for name in sorted(tasks) if tasks[name] is not None}
        self.targets = targets
        self.text_column = text_column
        self._check_tasks()
        weights = np.array([entry["weight"] for entry in self.tasks.values()])
        self._shares = weights / weights.sum()

    def _check_tasks(self) -> None:
        from ..recall.text import TASKS

        known = {task.__name__: task for task in TASKS}
        if not self.tasks:
            raise CorpusError(f"data.source.tasks={{}}: must have one of {', '.join(known)}")
        for name, entry in self.tasks.items():
            if name not in known:
                raise CorpusError(f"data.source.tasks.{name}: must be one of {', '.join(known)}")
            settings = {
                key: parameter
                for key, parameter in inspect.signature(known[name]).parameters.items()
                if parameter.kind is parameter.KEYWORD_ONLY
            }
            for key in entry:
                if key not in ("weight", *settings):
                    keys = ", ".join(["weight", *settings])
                    raise CorpusError(
                        f"data.source.tasks.{name}.{key}={entry[key]}: must be left out; the keys here are {keys}"
                    )
                if isinstance(entry[key], int | float) != (key == "weight"):
                    accepted = "a number > 0" if key == "weight" else "a list of values, of which each sequence has one"
                    raise CorpusError(f"data.source.tasks.{name}.{key}={entry[key]}: must be {accepted}")
                for value in entry[key] if key in settings else ():
                    _check_value(f"data.source.tasks.{name}.{key}", value, settings[key].annotation)
            for key in ("weight", *(key for key, each in settings.items() if each.default is each.empty)):
                if key not in entry:
                    raise CorpusError(f"data.source.tasks.{name}.{key}: missing")

    # The text

    def _text(self, path: str | None) -> Source:
        return StandardLibrary(tests=False) if path is None else Files(self.text_column, split_by="content")

    def check(self, path: str | None) -> None:
        self._text(path).check(path)

    def identity(self, path: str | None, cache: Path | None = None) -> dict:
        return self._text(path).identity(path, cache)

    def load(self, path: str | None, arrow_cache: Path, bad: BadDocuments) -> "dict[str, Dataset]":
        return self._text(path).load(path, arrow_cache, bad)

    # The sequences

    @property
    def settings(self) -> Mapping[str, object]:
        return {"tasks": self.tasks, "targets": self.targets}

    def generate(
        self, documents: "Split", tokenizer: "Tokenizer", length: int, generator: np.random.Generator
    ) -> "Batch":
        name = list(self.tasks)[generator.choice(len(self.tasks), p=self._shares)]
        values = {key: each for key, each in self.tasks[name].items() if key != "weight"}
        settings = {key: each[generator.integers(len(each))] for key, each in values.items()}
        return self._sequence(name, settings, documents, tokenizer, length, generator)

    def check_length(self, documents: "Split", tokenizer: "Tokenizer", length: int) -> None:
        """Raises CorpusError unless each task fits into a sequence with each combination of its values. One sequence of
        each is generated, at FITS of the length."""
        for name, settings in self._all_settings():
            try:
                self._sequence(name, settings, documents, tokenizer, int(FITS * length), np.random.default_rng(0))
            except CorpusError as error:
                key = ",".join(f"{key}:{value}" for key, value in settings.items())
                raise CorpusError(
                    f"data.source.tasks.{name}={{{key}}}: must fit into {FITS:.0%} of data.sequence_length={length}:"
                    f" {error}"
                ) from None

    def _all_settings(self) -> Iterator[tuple[str, dict[str, Any]]]:
        for name, entry in self.tasks.items():
            keys = [key for key in entry if key != "weight"]
            for values in itertools.product(*(entry[key] for key in keys)):
                yield name, dict(zip(keys, values, strict=True))

    def _sequence(
        self,
        task: str,
        settings: Mapping[str, Any],
        documents: "Split",
        tokenizer: "Tokenizer",
        length: int,
        generator: np.random.Generator,
    ) -> "Batch":
        from ..recall import text
        from ..recall.haystack import Material

        material = Material(tokenizer, documents.flat, documents.offsets[:-1])
        made = getattr(text, task)(material, length, generator, **settings)
        sequence = {name: tensor[0] for name, tensor in made.items()}
        if self.targets == "all":  # the last token, which is the end of an answer, is a target anyway
            sequence["targets"][:-1] = sequence["tokens"][1:]
        return sequence


def _check_value(key: str, value: object, annotation: Any) -> None:
    """Raises CorpusError unless a task takes this value of a setting."""
    try:
        TypeAdapter(annotation).validate_python(value, strict=True)
    except ValidationError as error:
        accepted = error.errors()[0]["msg"].removeprefix("Input should be ")
        raise CorpusError(f"{key}: {value} must be {accepted}") from None

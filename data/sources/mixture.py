"""Several sources as one: a corpus of all their documents, under one tokenizer."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import lcm
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
from pydantic import Field

from ..errors import CorpusError
from .bad_documents import EXAMPLES, BadDocuments
from .base import GeneratingSource, Paths, Source
from .file_rows import names_of
from .splits import SPLITS
from .token_shards import TokenShards

if TYPE_CHECKING:
    from datasets import Dataset

    from ..tokenizers import Tokenizer

LARGEST_BLOCK = 10_000  # samples; the order of a block is drawn at once
NO_NAME = ""
"""The key of the documents whose names begin with the names of their sources already."""


@dataclass(frozen=True)
class MixedSource:
    """A source of a mixture. Its documents have names that begin with `name/`.

    weight: share of the training samples, relative to the other sources.
    """

    name: str
    source: Source
    path: Paths
    weight: float


class Mixture(Source):
    """A corpus of the documents of several sources; training draws its samples from them by weight
    (../ordering/mixed_sampler.py).

    Each source must have documents in every split. A source that generates its sequences has no documents of its own:
    it uses those of the sources of text. Files of tokens (`TokenShards`) are read in place (../corpus/joined.py).

    tokens_at_a_time: the tokens of consecutive training sequences from one source, before the next source is drawn;
        None draws a source for each sequence.
    """

    def __init__(self, sources: Sequence[MixedSource], tokens_at_a_time: Annotated[int, Field(ge=1)] | None = None):
        self.sources = sources
        self.tokens_at_a_time = tokens_at_a_time
        self.with_documents = [mixed for mixed in sources if not isinstance(mixed.source, GeneratingSource)]
        self.skips = any(mixed.source.skips for mixed in self.with_documents)
        names = [mixed.name for mixed in sources]
        for mixed in sources:
            if mixed.source.streaming:
                raise CorpusError(f"data.source.sources: {mixed.name}: streaming=true: must be false in a mixture")
        for name in names:
            if names.count(name) > 1:
                raise CorpusError(f"data.source.sources: must have different names, and {names.count(name)} are {name}")
        if not self.with_documents or (self.generating and self.texts is None):
            raise CorpusError(f"data.source.sources: must have a source of text for {' and '.join(names)}")
        shares = [Fraction(str(mixed.weight)) for mixed in sources]
        scale = lcm(*(share.denominator for share in shares))
        common = np.gcd.reduce([int(share * scale) for share in shares]) if shares else 1
        self.weights = {name: int(share * scale) // int(common) for name, share in zip(names, shares, strict=True)}
        if sum(self.weights.values()) > LARGEST_BLOCK:
            ratio = ":".join(map(str, self.weights.values()))
            raise CorpusError(
                f"data.source.sources: must have weights in a ratio of integers whose sum is at most {LARGEST_BLOCK:,},"
                f" and has {ratio}"
            )

    @property
    def byte_unit(self) -> str:
        """The unit that all sources with documents share; "byte" if their units differ."""
        units = {mixed.source.byte_unit for mixed in self.with_documents}
        return units.pop() if len(units) == 1 else Source.byte_unit

    @property
    def mixed(self) -> dict[str, Source]:
        return {mixed.name: mixed.source for mixed in self.sources}

    @property
    def token_files(self) -> list[MixedSource]:
        """The sources whose documents stay in files of tokens."""
        return [mixed for mixed in self.with_documents if isinstance(mixed.source, TokenShards)]

    @property
    def texts(self) -> "Mixture | None":
        """A mixture of the other sources that have documents; None if there are none."""
        texts = [mixed for mixed in self.with_documents if mixed not in self.token_files]
        return Mixture(texts) if texts else None

    @property
    def generating(self) -> dict[str, GeneratingSource]:
        return {mixed.name: mixed.source for mixed in self.sources if isinstance(mixed.source, GeneratingSource)}

    def check_settings(self, path: Paths, on_bad_document: str) -> None:
        self.check(path)
        for mixed in self.with_documents:
            named(mixed.name, mixed.source.check_settings, mixed.path, on_bad_document)

    def check(self, path: Paths) -> None:
        if path is not None:
            raise CorpusError(
                f"data.path={path}: must be null, since each of data.source.sources has a path of its own"
            )
        for name in self.generating:
            path = next(mixed.path for mixed in self.sources if mixed.name == name)
            if path is not None:
                raise CorpusError(
                    f"data.source.sources: {name}: path={path}: must be left out: its text is that of the other sources"
                )

    def check_evaluated(self) -> None:
        for mixed in self.with_documents:
            named(mixed.name, mixed.source.check_evaluated)

    def use_tokenizer(self, tokenizer: "Tokenizer") -> None:
        for mixed in self.sources:
            named(mixed.name, mixed.source.use_tokenizer, tokenizer)

    def identity(self, path: str | None, cache: Path | None = None) -> dict:
        # Without the weights: they do not change the documents.
        parts = [[mixed.name, mixed.source.identity(mixed.path, cache)] for mixed in self.with_documents]
        return {"source": "mixture", "sources": parts}

    def load(self, path: str | None, arrow_cache: Path, bad: BadDocuments) -> "dict[str, Dataset]":
        from datasets import concatenate_datasets

        loaded: dict[str, list[Dataset]] = {split: [] for split in SPLITS}
        for mixed in self.with_documents:
            own = BadDocuments(bad.policy, mixed.path)
            splits = named(mixed.name, mixed.source.load, mixed.path, arrow_cache / mixed.name, own)
            bad.count += own.count
            bad.examples = [*bad.examples, *(f"{mixed.name}: {each}" for each in own.examples)][:EXAMPLES]
            for split in SPLITS:
                if not len(splits.get(split, ())):
                    raise CorpusError(
                        f"data.source.sources: {mixed.name}: must hold documents of every split, and the {split} split"
                        " has none"
                    )
                rows = splits[split]
                names = [f"{mixed.name}/{name}" for name in names_of(rows)]
                loaded[split].append(rows.select_columns("text").add_column("name", names))
        return {
            split: concatenate_datasets(parts).select(_alternating([len(part) for part in parts]))
            for split, parts in loaded.items()
        }


def _alternating(lengths: Sequence[int]) -> np.ndarray:
    """Returns the rows of concatenated parts in an order in which every part advances at an even rate. A tokenizer that
    learns from the first documents alone then learns from every source."""
    places = np.concatenate([(np.arange(length) + 1) / length for length in lengths])
    return np.argsort(places, kind="stable")


def named(name: str, function: Callable[..., Any], *arguments: object) -> Any:
    """Calls a function of a source. Its errors begin with the source's name."""
    try:
        return function(*arguments)
    except CorpusError as error:
        raise CorpusError(f"data.source.sources: {name}: {error}") from error

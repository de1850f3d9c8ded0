"""DNA sequences as documents."""

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import numpy as np
from pydantic import Field

from ..errors import CorpusError
from .bad_documents import BadDocuments
from .base import Extensions, Paths
from .file_rows import names_of, texts_of, write_rows
from .files import UNDIVIDED, Files
from .splits import SPLITS
from .strains import pairs

if TYPE_CHECKING:
    from datasets import Dataset

Regions = Annotated[tuple[Annotated[int, Field(ge=256)], ...], Field(min_length=1)]

Parts = Annotated[tuple[Annotated[float, Field(gt=0)], ...], Field(min_length=3, max_length=3)]

COMPLEMENT = str.maketrans("ACGT", "TGCA")


class Genome(Files):
    """FASTA files, as `Files` finds them. A document is a run of A, C, G and T: every other base ends it (tables.py). A
    file of another extension is one document of these four letters.

    reverse_complement: training has the opposite strand of each document, too, as a document of its own.
    pairs: a document is instead a region of one sequence followed by the region of another one that is nearly the same
        (strains.py). Training has regions of each of these lengths, in bases, and validation and test of the longest.
    parts: shares of the bases of each sequence for training, validation and test, in this order. None: each sequence
        belongs to one split, as `Files` divides them.
    """

    byte_unit = "base"
    more_splits = "'data.source.parts=[0.9,0.05,0.05]' divides each sequence; or " + Files.more_splits

    def __init__(
        self,
        extensions: Extensions,
        split_by: Literal["name", "folder"],
        reverse_complement: bool,
        pairs: Regions | None = None,
        parts: Parts | None = None,
    ):
        super().__init__("text", extensions, split_by)
        self.reverse_complement = reverse_complement
        self.pairs = None if pairs is None else tuple(pairs)
        self.parts = None if parts is None else tuple(parts)
        if self.parts and abs(sum(self.parts) - 1) > 1e-9:
            raise CorpusError(f"data.source.parts={list(self.parts)}: must be three shares that add up to 1")
        if self.parts and self.pairs:
            raise CorpusError(f"data.source.parts={list(self.parts)}: must be null with data.source.pairs")

    def check(self, path: Paths) -> None:
        super().check(path)
        if self.parts and UNDIVIDED not in self.find(path):
            raise CorpusError(
                f"data.source.parts={list(self.parts)}: must be null for data.path={path}, which has a folder train/"
            )

    def load(self, path: Paths, arrow_cache: Path, bad: BadDocuments) -> "dict[str, Dataset]":
        splits = super().load(path, arrow_cache, bad)
        for rows in splits.values():
            for name, text in zip(names_of(rows), texts_of(rows), strict=True):
                if other := text.strip("ACGT"):
                    raise CorpusError(
                        f"data.source.extensions={list(self.extensions)}: must be those of FASTA files (.fa, .fna,"
                        f" .fasta), or of texts of A, C, G and T alone, and {name} has {other[0]!r}"
                    )
        if self.parts:
            splits = self._divided(splits, arrow_cache)
        if self.pairs:
            splits = {split: self._paired(split, rows, arrow_cache) for split, rows in splits.items()}
        if self.reverse_complement:
            splits["train"] = write_rows(_both_strands(splits["train"]), arrow_cache / "both_strands.rows")
        return splits

    def _divided(self, splits: "dict[str, Dataset]", arrow_cache: Path) -> "dict[str, Dataset]":
        """Returns the parts of all sequences, as the rows of each split."""
        divided = {}
        for split, shares in zip(SPLITS, pairwise(np.cumsum((0.0, *self.parts))), strict=True):
            parts = (
                {"name": row["name"], "text": part}
                for rows in splits.values()
                for row in rows
                if (part := row["text"][slice(*(round(share * len(row["text"])) for share in shares))])
            )
            divided[split] = write_rows(parts, arrow_cache / f"{split}_parts.rows")
        return divided

    def _paired(self, split: str, rows: "Dataset", arrow_cache: Path) -> "Dataset":
        """Returns the pairs of regions of a split's sequences, as rows."""
        lengths = self.pairs if split == "train" else (max(self.pairs),)
        texts = dict(zip(names_of(rows), texts_of(rows), strict=True))
        paired = write_rows(pairs(texts, lengths), arrow_cache / f"{split}_pairs.rows")
        if not len(paired):
            raise CorpusError(
                f"data.source.pairs={list(self.pairs)}: must be lengths of regions that two sequences of each split "
                f"share, and {split} has none of {lengths[-1]} bases among {', '.join(texts)}"
            )
        return paired

    def load_evaluated(self, path: Paths, arrow_cache: Path, bad: BadDocuments, split: str) -> "list[Dataset]":
        if self.reverse_complement or self.parts:
            whole = Genome(self.extensions, self.split_by, False, self.pairs)
            return whole.load_evaluated(path, arrow_cache, bad, split)
        return super().load_evaluated(path, arrow_cache, bad, split)


def _both_strands(rows: "Dataset") -> Iterator[dict[str, str]]:
    for row in rows:
        yield row
        yield {"name": f"{row['name']}:reverse", "text": row["text"].translate(COMPLEMENT)[::-1]}

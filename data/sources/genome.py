"""DNA sequences as documents."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from ..errors import CorpusError
from .bad_documents import BadDocuments
from .base import Extensions, Paths
from .file_rows import names_of, texts_of, write_rows
from .files import Files

if TYPE_CHECKING:
    from datasets import Dataset

COMPLEMENT = str.maketrans("ACGT", "TGCA")


class Genome(Files):
    """FASTA files, as `Files` finds them. A document is a run of A, C, G and T: every other base ends it (tables.py). A
    file of another extension is one document of these four letters.

    reverse_complement: training has the opposite strand of each document, too, as a document of its own.
    """

    def __init__(self, extensions: Extensions, split_by: Literal["name", "folder"], reverse_complement: bool):
        super().__init__("text", extensions, split_by)
        self.reverse_complement = reverse_complement

    def load(self, path: Paths, arrow_cache: Path, bad: BadDocuments) -> "dict[str, Dataset]":
        splits = super().load(path, arrow_cache, bad)
        for rows in splits.values():
            for name, text in zip(names_of(rows), texts_of(rows), strict=True):
                if other := text.strip("ACGT"):
                    raise CorpusError(
                        f"data.source.extensions={list(self.extensions)}: must be those of FASTA files (.fa, .fna,"
                        f" .fasta), or of texts of A, C, G and T alone, and {name} has {other[0]!r}"
                    )
        if self.reverse_complement:
            splits["train"] = write_rows(_both_strands(splits["train"]), arrow_cache / "both_strands.rows")
        return splits


def _both_strands(rows: "Dataset") -> Iterator[dict[str, str]]:
    for row in rows:
        yield row
        yield {"name": f"{row['name']}:reverse", "text": row["text"].translate(COMPLEMENT)[::-1]}

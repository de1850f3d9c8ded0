"""The units of losses, with the names that a tokenizer gives a token and a source gives a byte of text.

    text                 bits per byte, and nats per token
    genomes              bits per base, and nats per token
    series of numbers    nats per value
    numbers of tokens    nats per token
    mixtures             bits per byte, where a base of a genome is one byte; each source has its own unit besides

`Units` maps the numbers of result files, `loss` and `bits_per_byte`, to their units. Where `bits_per_byte` has no unit,
result files do not have that number. evaluation.json and summary.json contain the units of their numbers, and whatever
shows a loss reads them there.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .sources import Source
    from .tokenizers import Tokenizer

LOSS = "loss"
BITS = "bits_per_byte"

Units = Mapping[str, str]

OF_TEXT: Units = {LOSS: "nats per token", BITS: "bits per byte"}
OF_BASES: Units = {LOSS: "nats per token", BITS: "bits per base"}
OF_VALUES: Units = {LOSS: "nats per value"}


def units_of(tokenizer: "Tokenizer", source: "Source") -> dict[str, str]:
    """Returns the units of losses on documents of `source`, whose tokens are those of `tokenizer`."""
    bits = {BITS: f"bits per {source.byte_unit}"} if tokenizer.per_byte else {}
    return {LOSS: f"nats per {tokenizer.token_unit}"} | bits


def units_by_source(tokenizer: "Tokenizer", source: "Source") -> dict[str, Units]:
    """Returns the units of losses on the documents of each source of a mixture, by its name; {} for other sources."""
    return {name: units_of(tokenizer, each) for name, each in source.mixed.items()}


def units_in(row: Mapping[str, Any], source: Mapping[str, Any] | None = None) -> Units:
    """Returns the units of a row of evaluation.json or of a summary.json; files of early versions do not name them.

    source: `data.source` in the run's config, where it is known.
    """
    if "units" in row:
        return row["units"]
    if (row.get("tokenizer") or {}).get("tokenizer") == "bins":
        return OF_VALUES
    of_text = OF_BASES if source and source.get("_target_") == "data.sources.Genome" else OF_TEXT
    return {LOSS: of_text[LOSS]} if row.get(BITS, 0.0) is None else of_text


def quality_in(units: Units) -> str:
    """Returns the number by which runs are compared: BITS, or LOSS where there are no bits per byte."""
    return BITS if BITS in units else LOSS


def short(unit: str) -> str:
    """Returns "bits/byte" for "bits per byte"."""
    return unit.replace(" per ", "/")


def counted_by(unit: str) -> str:
    """Returns "byte" for "bits per byte"."""
    return unit.rpartition(" per ")[2]

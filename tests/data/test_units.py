"""Units of losses: those of a tokenizer and a source, and those of result files, also of early versions."""

import pytest

from data.sources import Files, Genome, Mixture, TimeSeries
from data.sources.mixture import MixedSource
from data.tokenizers import Bins, Bytes, TokenIds
from data.units import counted_by, quality_in, short, units_by_source, units_in, units_of

TEXT = Files("text", (".txt",))
GENOME = Genome((".fa",), "name", True)
SERIES = TimeSeries((".csv",), None, (0.7, 0.1, 0.2))
PER_TOKEN = {"loss": "nats per token"}


def mixture(*sources):
    return Mixture([MixedSource(str(n), source, "path", 1.0) for n, source in enumerate(sources)])


@pytest.mark.parametrize(
    ("tokenizer", "source", "units"),
    [
        (Bytes(), TEXT, PER_TOKEN | {"bits_per_byte": "bits per byte"}),
        (Bytes(), GENOME, PER_TOKEN | {"bits_per_byte": "bits per base"}),
        (Bytes(), mixture(GENOME, GENOME), PER_TOKEN | {"bits_per_byte": "bits per base"}),
        (Bytes(), mixture(GENOME, TEXT), PER_TOKEN | {"bits_per_byte": "bits per byte"}),
        (Bins(32, 4.0), SERIES, {"loss": "nats per value"}),
        (TokenIds(9, 0), TEXT, PER_TOKEN),
    ],
)
def test_tokenizer_and_source_give_the_units(tokenizer, source, units):
    found = units_of(tokenizer, source)
    assert found == units
    assert units_in({"loss": 1.0, "bits_per_byte": 2.0, "units": found}) == units
    assert quality_in(found) == ("bits_per_byte" if "bits_per_byte" in units else "loss")


def test_each_source_of_a_mixture_has_its_own_units():
    base, byte = PER_TOKEN | {"bits_per_byte": "bits per base"}, PER_TOKEN | {"bits_per_byte": "bits per byte"}
    assert units_by_source(Bytes(), mixture(GENOME, TEXT)) == {"0": base, "1": byte}
    assert units_by_source(TokenIds(9, 0), mixture(TEXT)) == {"0": PER_TOKEN}
    assert units_by_source(Bytes(), GENOME) == {}


@pytest.mark.parametrize(
    ("row", "units"),
    [
        ({"loss": 1.0, "bits_per_byte": 2.0}, PER_TOKEN | {"bits_per_byte": "bits per byte"}),
        ({"loss": 1.0, "bits_per_byte": None}, PER_TOKEN),
        ({"loss": 1.0, "bits_per_byte": 0.5, "tokenizer": {"tokenizer": "bins"}}, {"loss": "nats per value"}),
        ({}, PER_TOKEN | {"bits_per_byte": "bits per byte"}),
    ],
)
def test_units_of_files_of_early_versions(row, units):
    assert units_in(row) == units


def test_names_of_units():
    assert short("bits per base") == "bits/base" and counted_by("nats per value") == "value"

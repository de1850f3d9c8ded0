"""The table of a run and of an evaluation."""

import json
from pathlib import Path

import pytest

from scripts.reporting.run_table import report_rows

SAMPLE = json.loads((Path(__file__).parent / "sample_run/evaluation.json").read_text())["rows"][0]
SAMPLE |= {"word_perplexity": None, "trailing": None}


def test_losses_of_a_series_are_per_value():
    lengths = {"loss_first_512": 1.0, "trailing": {"loss": 1.5}, "by_context": [{"context": 512, "loss": 2.0}]}
    bits = {"bits_per_byte": None, "units": {"loss": "nats per value"}, "baselines": {"bigram_loss": 3.5}}
    names = dict(report_rows(SAMPLE | bits | lengths, {}))
    assert names["loss"] == f"{SAMPLE['loss']:.4f} nats/value"
    assert names["  bigram model, same values"] == "3.5000"
    assert {
        "loss of a document's first 512 values",
        "loss of a document's last 2,048 values",
        "loss of the same values, 512 before them",
    } <= names.keys()
    assert not any("bits" in name or "token" in name for name in names)


def test_losses_of_a_row_of_an_early_version_are_per_byte():
    names = dict(report_rows(SAMPLE, {}))
    assert names["bits per byte"] == f"{SAMPLE['bits_per_byte']:.4f}" and names["loss"].endswith(" nats/token")


@pytest.mark.parametrize(("order", "shown"), [(0, True), (1, False), (2, True)])
def test_a_markov_model_of_order_1_is_the_bigram_model_and_is_shown_once(order, shown):
    baselines = {"bigram_bits_per_byte": 1.95, "markov_bits_per_byte": 1.95, "markov_order": order}
    names = [name for name, value in report_rows(SAMPLE | {"baselines": baselines}, {}) if value == "1.9500"]
    assert names == ["  bigram model, same tokens", f"  Markov model of order {order}"][: 1 + shown]

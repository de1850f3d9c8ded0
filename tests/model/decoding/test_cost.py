"""The price of decoding: what the patterns ask for, and a measured time."""

import pytest
import torch

from model.decoding import cost, decoding_cost, expected_bytes
from tests.model.decoding.test_parity import build


@pytest.mark.parametrize("name", ["window", "routed"])
def test_the_cost_is_that_of_the_patterns_at_this_length(name):
    model = build(name).float()
    found = decoding_cost(model, 150, "32-true")
    assert found["cache_bytes"] == expected_bytes(model, 150, 1)[0]
    assert found["decode_ms_per_token"] > 0


def test_under_autocast_the_cache_is_smaller():
    model = build("window").float()
    whole, half = (decoding_cost(model, 150, precision)["cache_bytes"] for precision in ("32-true", "bf16-mixed"))
    assert half == whole // 2


def test_a_cache_that_does_not_fit_is_not_timed(monkeypatch, caplog):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(cost.Cache, "reserve", full)
    found = decoding_cost(build("window"), 150, "32-true")
    assert found["decode_ms_per_token"] is None and found["cache_bytes"] > 0
    assert "150 tokens does not fit into memory" in caplog.text

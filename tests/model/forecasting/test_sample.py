"""The forecast FLOPs of a step equal those that a run counts."""

import pytest
import torch

from configs.build import build_model
from configs.forecasting import draw_sample, flops_of_phases
from model.forecasting import steps_of_cost, total_cost
from model.forecasting.sample import MAX_SEQUENCES
from model.precision import devices_of

ROUTED = ("window=16", "block=16", "top_k=2")
SMALL_PATTERNS = {
    "window": ("attention.patterns.local.width=16",),
    "dense": (),
    "hierarchical": (
        *("attention.patterns.hierarchy.window=16", "attention.patterns.hierarchy.spans=[4,16]"),
        "attention.patterns.hierarchy.reaches=[32]",
    ),
    "routed": tuple(f"attention.patterns.routed.{each}" for each in ROUTED),
    "native_sparse": tuple(f"attention.patterns.native_sparse.{each}" for each in (*ROUTED, "summary_span=8")),
}


@pytest.mark.parametrize("choice", SMALL_PATTERNS)
def test_flops_are_those_that_the_model_counts_after_it_has_run(composed, choice):
    config, data = composed(
        f"attention={choice}",
        *SMALL_PATTERNS[choice],
        "attention.block=16",
        "data.batch_size=2",
        "trainer.accumulate=3",
    )
    model = build_model(config, data.vocabulary)
    batch = data.sample(MAX_SEQUENCES)
    layouts = model.build_layouts(batch["document"], 64)
    model.train()
    model.loss(
        batch["tokens"], batch["targets"], batch["position"], layouts
    )  # a routed layer records the pairs that its router scored
    counted = model.cost(layouts, len(batch["tokens"])).flops / len(batch["tokens"]) * 2 * 3
    assert flops_of_phases(config, data) == [(0, counted)]


def test_flops_come_from_the_documents_of_the_data(composed):
    """Against the definition: 6 a weight of a matrix and token, 12 a visible pair, head and head_dim."""
    config, data = composed("attention=window", "attention.patterns.local.width=16", "data.batch_size=5")
    document = data.sample(MAX_SEQUENCES)["document"]
    index = torch.arange(64)
    apart = index[:, None] - index
    seen = (apart >= 0) & (apart < 16) & (document[:, :, None] == document[:, None, :])
    assert (document[:, 0] != document[:, -1]).any(), "some sequence holds more than one document"
    width, layers, heads, kv_heads, head_dim, hidden, vocabulary = 32, 2, 4, 2, 8, 64, 320
    matrices = layers * (width * head_dim * (2 * heads + 2 * kv_heads) + 3 * width * hidden) + vocabulary * width
    by_hand = 6 * matrices * 64 + 12 * layers * heads * head_dim * int(seen.sum()) / len(document)
    ((_, flops),) = flops_of_phases(config, data)
    assert flops == pytest.approx(5 * by_hand, rel=1e-12)


def test_a_sample_is_the_same_each_time_and_leaves_the_data_alone(composed):
    config, data = composed()
    state = torch.get_rng_state()
    first, second = (draw_sample(config, data) for _ in range(2))
    assert torch.equal(first.document, second.document)
    assert torch.equal(torch.get_rng_state(), state) and data.cursor == 0
    other = composed("seed=7")[1].sample(3)["document"]
    assert other.shape == (3, 64)


def test_devices(monkeypatch):
    trainer = {"accelerator": "cuda", "nodes": 1}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    assert [devices_of(trainer | {"devices": d}) for d in (2, "2", [0, 3, 5], "auto", -1)] == [2, 2, 3, 8, 8]
    assert devices_of({"accelerator": "cpu", "devices": "auto", "nodes": 1}) == 1
    assert devices_of({"accelerator": "cpu", "devices": 4, "nodes": 2}) == 8


def test_the_flops_of_a_run_add_up_over_its_phases():
    phases = [(0, 2.0), (10, 3.0), (14, 5.0)]
    for steps, total in ((0, 0), (4, 8), (10, 20), (12, 26), (14, 32), (20, 62)):
        assert total_cost(phases, steps) == total
        assert steps_of_cost(phases, total) == steps
    assert steps_of_cost(phases, 35.0) == 14.6

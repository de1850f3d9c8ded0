"""The probe on a model whose answer is known, and against models that are rebuilt under every schedule."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from kernels.patterns import Dense, Hierarchical, NativeSparse, Pattern, Routed, Strided, Window
from model import Transformer
from model.evaluation.distance_mass import mass_by_distance, near_distance, octave_edges
from model.evaluation.layer_probe import chunks_to_probe, layer_passes, probe_units, schedule_losses
from model.evaluation.layer_schedules import (
    change_of,
    changes_by_position,
    counts_to_measure,
    position_edges,
    rank,
    recommend,
    schedules,
)
from model.evaluation.loss_store import LossStore
from model.evaluation.protocol import Protocol
from model.evaluation.replacement import Replacement, Unit, first_sparse_layer, units_of
from model.evaluation.scoring import token_losses
from model.transformer import Layer
from tests.model.evaluation.copying import COPIES, LAYERS, MarkedDocuments, copying_model
from tests.model.evaluation.documents import Documents
from tests.model.small import config, lively, plan

WIDTH = 16
COPYING_HEAD = Unit(COPIES, 0)


def replacement(pattern: Pattern) -> Replacement:
    return Replacement(plan({"full": Dense(), "local": pattern}, ["full"]), "full", "local")


def probed(model, documents, pattern: Pattern, folder: Path, per_head: bool = False, **changes):
    """The chunks, and what `probe_units` finds on them."""
    units = units_of(model, per_head)
    work = chunks_to_probe(documents, 100, 10**6, replacement(pattern))
    arguments = dict(tokens_at_once=200, queries=8, seed=0, store=LossStore(folder), progress=lambda _: None) | changes
    return work, probe_units(model, replacement(pattern), documents, work, units, **arguments)


@pytest.fixture(scope="module")
def copying() -> Transformer:
    return copying_model()


@pytest.fixture(scope="module")
def documents() -> MarkedDocuments:
    return MarkedDocuments(70, 100, 96, 80)


@pytest.mark.parametrize("per_head", [False, True])
def test_the_layer_and_the_head_that_copy_come_first_by_far(copying, documents, tmp_path, per_head):
    work, found = probed(copying, documents, Window(WIDTH), tmp_path, per_head)
    changes = {unit: change_of(losses, found.dense, work) for unit, losses in found.changed.items()}
    first, *others = rank(changes)
    assert first == (COPYING_HEAD if per_head else Unit(COPIES))
    assert changes[first].low > 0 and changes[first].change > 0.08, (
        "2 or 3 of each document's asks are a guess among all tokens: 3.5 nats"
    )
    assert max(abs(changes[unit].change) for unit in others) < 0.03 * changes[first].change


@pytest.mark.parametrize("per_head", [False, True])
def test_the_schedule_that_keeps_the_copying_unit_is_nearly_dense(copying, documents, tmp_path, per_head):
    work, found = probed(copying, documents, Window(WIDTH), tmp_path, per_head)
    changes = {unit: change_of(losses, found.dense, work) for unit, losses in found.changed.items()}
    units = units_of(copying, per_head)

    def measure(kept):
        arguments = dict(tokens_at_once=200, store=LossStore(tmp_path), progress=lambda _: None)
        losses = schedule_losses(copying, replacement(Window(WIDTH)), documents, work, units, kept, **arguments)
        return change_of(losses, found.dense, work)

    counts = counts_to_measure(len(units), "octaves")
    kept = schedules(copying, replacement(Window(WIDTH)), changes, counts, 100, measure)
    entry = ["full", "local"] if per_head else "full"
    assert kept[1].schedule == ["local"] * COPIES + [entry] + ["local"] * (LAYERS - COPIES - 1)
    assert abs(kept[1].measured.change) < 0.005
    assert kept[0].schedule == ["local"] * LAYERS and kept[0].measured.low > 0.08
    assert kept[-1].schedule == ["full"] * LAYERS and kept[-1].measured.change == 0
    assert kept[1].predicted == pytest.approx(sum(c.change for u, c in changes.items() if u != rank(changes)[0]))
    assert recommend(kept, tolerance=0.005) is kept[1] and recommend(kept, tolerance=1.0) is kept[0]
    for fewer, more in pairwise(kept):
        assert fewer.attention_flops < more.attention_flops and fewer.cache_bytes <= more.cache_bytes


def test_the_change_is_where_the_window_hides_the_mark(copying, documents, tmp_path):
    work, found = probed(copying, documents, Window(WIDTH), tmp_path)
    by_position = changes_by_position(found.changed[Unit(COPIES)], found.dense, work)
    assert [each.start for each in by_position] == [0, 4, 8, 16, 32, 64]
    assert by_position[-1].stop == 99 and sum(each.tokens for each in by_position) == sum(map(len, found.dense))
    near, far = by_position[:3], by_position[3:]
    assert all(abs(each.change) < 1e-12 for each in near), "a window of 16 hides nothing from the first 16 tokens"
    assert all(each.change > 0.05 for each in far)


PATTERNS = {
    "window": Window(9, 2),
    "strided": Strided(6, 16, 2, "document"),
    "hierarchical": Hierarchical(12, (4,), (), "mean"),
    "routed": Routed(8, 16, 1, "mean_key", "group", False, 8),
    "native_sparse": NativeSparse(8, 16, 1, "mean_key", "group", False, 8, 4, "mean", "lse"),
}


@pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS)
@pytest.mark.parametrize("sink_logits", [False, True])
def test_a_changed_layer_gives_the_loss_of_a_model_rebuilt_with_that_schedule(pattern, sink_logits, tmp_path):
    sizes = dict(layers=3, sink_logits=sink_logits)
    model = lively(Transformer(config(**sizes), plan()).double()).eval()
    _, found = probed(model, Documents(90, 70, 61), pattern, tmp_path)
    for unit in units_of(model, per_head=False):
        schedule = ["local" if layer == unit.layer else "full" for layer in range(3)]
        rebuilt = Transformer(config(**sizes), plan({"full": Dense(), "local": pattern}, schedule)).double()
        rebuilt.load_state_dict(model.state_dict())
        expected = token_losses(
            rebuilt.eval(), Documents(90, 70, 61), Protocol("whole", None, None), tokens_at_once=200
        )
        for losses, right in zip(found.changed[unit], expected, strict=True):
            np.testing.assert_allclose(losses, right, rtol=0, atol=1e-10)
        assert max(np.abs(a - b).max() for a, b in zip(found.changed[unit], found.dense, strict=True)) > 1e-3


def test_a_changed_head_gives_the_loss_of_a_model_rebuilt_with_that_schedule(tmp_path):
    model = lively(Transformer(config(), plan()).double()).eval()
    _, found = probed(model, Documents(90, 40), Window(9), tmp_path, per_head=True)
    assert list(found.changed) == [Unit(0, 0), Unit(0, 1), Unit(1, 0), Unit(1, 1)]
    for unit, losses in found.changed.items():
        schedule = [["local" if unit == Unit(layer, head) else "full" for head in range(2)] for layer in range(2)]
        rebuilt = Transformer(config(), plan({"full": Dense(), "local": Window(9)}, schedule)).double()
        rebuilt.load_state_dict(model.state_dict())
        expected = token_losses(rebuilt.eval(), Documents(90, 40), Protocol("whole", None, None), tokens_at_once=200)
        for own, right in zip(losses, expected, strict=True):
            np.testing.assert_allclose(own, right, rtol=0, atol=1e-10)


def test_layers_before_a_changed_one_are_computed_once(copying, documents, tmp_path, monkeypatch):
    calls, compute = 0, Layer.compute

    def counted(self, *arguments):
        nonlocal calls
        calls += 1
        return compute(self, *arguments)

    monkeypatch.setattr(Layer, "compute", counted)
    advanced = []
    work, _ = probed(copying, documents, Window(WIDTH), tmp_path, tokens_at_once=400, progress=advanced.append)
    units = units_of(copying, per_head=False)
    assert calls == LAYERS + LAYERS * (LAYERS + 1) // 2 == layer_passes(LAYERS, units)
    assert sum(advanced) == calls * sum(segment.stop - segment.start for _, segment in work)


def test_what_is_stored_is_not_computed_again(copying, documents, tmp_path, monkeypatch):
    saved, save = [], LossStore.save

    def killed(store, name, losses):
        if len(saved) == 9:
            raise KeyboardInterrupt
        saved.append(name)
        save(store, name, losses)

    _, straight = probed(copying, documents, Window(WIDTH), tmp_path / "straight")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(LossStore, "save", killed)
        probed(copying, documents, Window(WIDTH), tmp_path / "killed")
    monkeypatch.setattr(LossStore, "save", lambda store, name, losses: (saved.append(name), save(store, name, losses)))
    _, continued = probed(copying, documents, Window(WIDTH), tmp_path / "killed")
    assert len(saved) == len(set(saved)) == len(list((tmp_path / "straight").iterdir()))
    np.testing.assert_array_equal(continued.mass, straight.mass)
    for unit in straight.changed:
        np.testing.assert_array_equal(np.concatenate(continued.changed[unit]), np.concatenate(straight.changed[unit]))


@pytest.mark.parametrize("sinks", [False, True])
@torch.no_grad()
def test_the_mass_is_that_of_the_whole_attention_matrix(sinks):
    model = lively(Transformer(config(sink_logits=sinks), plan()).double())
    attention, sizes, queries = model.layers[0].self_attn, [37, 24], [np.array([20, 36]), np.array([0, 5, 23])]
    x = torch.randn(1, 61, 16, generator=torch.Generator().manual_seed(0)).double()
    position = torch.cat([torch.arange(size) for size in sizes])[None]
    mass = mass_by_distance(attention, x, model.rotaries[0](position), sizes, queries, longest=100)
    q, k, *_ = attention.project(x, model.rotaries[0](position))
    expected, edges = np.zeros((2, 8)), octave_edges(100)
    assert edges == [0, 1, 2, 4, 8, 16, 32, 64, 128]
    for start, sampled in zip((0, 37), queries, strict=True):
        for query in sampled:
            for head in range(4):
                scores = q[0, head, start + query] @ k[0, head // 2, start : start + query + 1].T / 8**0.5
                sink = attention.sink_logits[head : head + 1].double() if sinks else scores[:0]
                for key, weight in enumerate(torch.cat([scores, sink]).softmax(0)[: query + 1].tolist()):
                    octave = np.searchsorted(edges, query - key, side="right") - 1
                    expected[head // 2, octave] += weight / len(sampled) / 2 / len(sizes)
    np.testing.assert_allclose(mass.numpy(), expected, atol=1e-6)
    assert (mass.sum(1) < 0.999).all() if sinks else torch.allclose(mass.sum(1), torch.ones(2).double())


def test_edges_of_positions_and_distances():
    assert position_edges(99) == [0, 4, 8, 16, 32, 64, 128] and position_edges(64)[-1] == 64
    assert position_edges(3) == [0, 1, 2, 4]
    assert near_distance(Window(16), 100) == 16 and near_distance(Window(17), 100) == 32
    assert near_distance(Window(90), 100) == 64 and octave_edges(64)[-1] == 64


def test_chunks_are_long_enough_and_taken_from_every_document_in_turn():
    taken = chunks_to_probe(Documents(250, 14, 120), 100, 290, replacement(Window(16)))
    assert [(document, segment.start, segment.stop) for document, segment in taken] == [(0, 0, 100), (2, 0, 100)]
    taken = chunks_to_probe(Documents(250, 14, 120), 100, 10**6, replacement(Window(16)))
    assert [(document, segment.start, segment.stop) for document, segment in taken] == [
        *((0, 0, 100), (2, 0, 100), (0, 100, 200), (2, 100, 119), (0, 200, 249))
    ]
    assert len(chunks_to_probe(Documents(250), 100, 10, replacement(Window(16)))) == 1
    assert chunks_to_probe(Documents(17), 100, 10**6, replacement(Window(16))) == []
    assert len(chunks_to_probe(Documents(18), 100, 10**6, replacement(Window(16)))) == 1


def test_bounds_are_paired_by_document():
    """Chunks of one document are one observation: with a change per document, there are two."""
    work = chunks_to_probe(Documents(201, 201), 100, 10**6, replacement(Window(16)))
    dense = [np.full(100, 5.0 * (index + 1)) for index in range(4)]
    change = change_of([losses + (0.1 if document else 0.3) for losses, (document, _) in zip(dense, work, strict=True)],
                       dense, work)  # fmt: skip
    half = 12.7062 * 0.1  # Student's t with one degree of freedom
    assert (change.low, change.high) == pytest.approx((0.2 - half, 0.2 + half), 1e-4)
    assert change.change == pytest.approx(0.2) and change.tokens == 400


def test_which_schedules_are_measured():
    assert counts_to_measure(6, "octaves") == [0, 1, 2, 4, 6]
    assert counts_to_measure(8, "octaves") == [0, 1, 2, 4, 8]
    assert counts_to_measure(1, "octaves") == [0, 1]
    assert counts_to_measure(3, "all") == [0, 1, 2, 3]


def test_a_model_shares_its_weights_with_the_changed_ones_and_a_pattern_with_weights_is_refused(copying):
    units = units_of(copying, per_head=False)
    changed = replacement(Window(8)).model(copying, units, [])
    for name, parameter in changed.named_parameters():
        assert parameter.data_ptr() == copying.get_parameter(name).data_ptr(), name
    assert first_sparse_layer(copying) is None and first_sparse_layer(changed) == 0
    with pytest.raises(ValueError, match=r"must be a pattern without parameters.*pooling"):
        replacement(Hierarchical(12, (4,), (), "learned")).model(copying, units, [])

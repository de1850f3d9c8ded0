"""The rehearsal books what a real step keeps: held to autograd's own saved tensors, and to a step's real end."""

import itertools
import weakref
from collections import Counter
from dataclasses import dataclass

import pytest
import torch

from configs.build import build_model
from scripts.forecasting import rehearsal
from scripts.forecasting.ledger import HEAP_BLOCK, Ledger
from scripts.forecasting.rehearsal import COPIES, GRADIENTS, LAYER, OPTIMIZER, WEIGHTS, _Rehearsal, rehearse
from scripts.loading import AUTOCAST
from tests.scripts.forecasting.test_sampling import SMALL_PATTERNS

CPU = torch.device("cpu")
BATCH, LENGTH = 3, 64


@dataclass(eq=False)
class Saved:
    """A tensor, as long as a graph keeps it for its backward pass."""

    tensor: torch.Tensor


def model_and_views(composed, choice, *overrides):
    config, data = composed(f"attention={choice}", *SMALL_PATTERNS[choice], f"data.batch_size={BATCH}", *overrides)
    model = build_model(config, data.vocabulary).train()
    batch = data.sample(BATCH)
    return config, model, batch, model.build_layouts(batch["document"], LENGTH)


@pytest.mark.parametrize(("choice", "precision"), [*itertools.product(SMALL_PATTERNS, ["32-true", "bf16-mixed"])])
def test_activations_of_a_layer_are_what_autograd_saves(composed, choice, precision):
    """Byte by byte: what the layers of a real model keep for the backward pass, and what the ledger says they do."""
    config, model, batch, views = model_and_views(composed, choice, f"trainer.precision={precision}")
    known = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    known |= {t.untyped_storage().data_ptr() for view in views for t in rehearsal._tensors(view)}
    kept = weakref.WeakSet()  # what a graph keeps lives as long as the graph: some is let go of within the layer

    def pack(tensor):
        saved = Saved(tensor.detach())  # an operator's own result, kept with its graph, would keep the graph
        kept.add(saved)
        return saved

    mixed = AUTOCAST.get(precision)
    x = model.embed_tokens(batch["tokens"]).detach().requires_grad_()
    rotation = model.rotary(batch["position"])
    known |= {t.untyped_storage().data_ptr() for t in (x, *rotation)}
    saving = torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved.tensor)
    with torch.autocast("cpu", mixed, enabled=mixed is not None), saving:
        y, _ = model.layers[0](x, rotation, views[0])
    storages = {storage.data_ptr(): storage for storage in (each.tensor.untyped_storage() for each in kept)}
    size = lambda storage: -(-storage.nbytes() // 64) * 64  # noqa: E731
    saved = sum(size(s) for pointer, s in storages.items() if pointer not in known)
    saved += size(y.untyped_storage())  # the next layer's input
    rehearsed = _Rehearsal(model, views, [0], BATCH, LENGTH, config, CPU)
    rehearsed.run()
    booked = sum(held for label, held in rehearsed.held.items() if label.startswith((LAYER, "copies of ")))
    saved += 64 * len(model.layers[0].self_attn.attend.noted)  # scalars that a router notes
    assert booked == saved


@pytest.mark.parametrize("checkpointing", ["false", "true"])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_deeper_model_is_what_its_layers_add(composed, optimizer, checkpointing):
    """Of six layers, two kinds: from one layer of each, and rehearsed whole."""
    overrides = (f"optimizer={optimizer}", f"model.activation_checkpointing={checkpointing}", "model.layers=6")
    config, data = composed(
        "attention=window_dense",
        "attention.patterns.local.width=16",
        "attention.schedule=[local,local,full]",
        *overrides,
    )
    model = build_model(config, data.vocabulary)
    views = model.build_layouts(data.sample(1)["document"], LENGTH)
    few = rehearse(model, views, 1, LENGTH, config, CPU)

    whole = _Rehearsal(model, views, range(6), 1, LENGTH, config, CPU)
    whole.run()
    most = {phase: size for phase, size in whole.ledger.most.items() if phase in ("update", "forward", "backward")}
    assert few.phase == max(most, key=most.get)
    assert few.total == pytest.approx(max(most.values()), rel=0.01)


def test_weights_gradients_and_state_are_counted(composed):
    config, model, _, views = model_and_views(composed, "window", "optimizer=muon")
    rehearsed = _Rehearsal(model, views, range(2), BATCH, LENGTH, config, CPU)
    rehearsed.run()
    sizes = {name: p.numel() * 4 for name, p in model.named_parameters()}
    hidden = sum(size for name, size in sizes.items() if "proj" in name)
    parts = rehearsed.ledger.at_peak["forward"]
    assert COPIES not in parts
    assert parts[GRADIENTS] == pytest.approx(sum(sizes.values()), rel=0.01)  # rounded up, one by one
    assert parts[WEIGHTS] == pytest.approx(sum(sizes.values()), rel=0.02)
    assert parts[OPTIMIZER] == pytest.approx(hidden + 2 * (sum(sizes.values()) - hidden), rel=0.02)


def test_gradients_are_held_in_the_backward_pass_where_they_are_accumulated(composed):
    config, model, _, views = model_and_views(composed, "window")
    backward = []
    for accumulate in (1, 2):
        trainer = config["trainer"] | {"accumulate": accumulate}
        rehearsed = _Rehearsal(model, views, range(2), BATCH, LENGTH, config | {"trainer": trainer}, CPU)
        rehearsed.run()
        backward.append(Counter(rehearsed.ledger.at_peak["backward"])[GRADIENTS])
    assert backward[0] < backward[1]
    assert backward[1] == pytest.approx(sum(p.numel() * 4 for p in model.parameters()), rel=0.01)


def test_compiled_layers_keep_less_and_nothing_of_the_tracing(composed):
    config, model, _, views = model_and_views(composed, "window", "trainer.precision=bf16-mixed")
    compiled = config | {"trainer": config["trainer"] | {"compile": True}}
    activations = lambda step: Counter(step.parts)[LAYER + "local"]  # noqa: E731
    eager, fused = (rehearse(model, views, BATCH, LENGTH, each, CPU) for each in (config, compiled))
    assert 0.4 * activations(eager) < activations(fused) < 0.8 * activations(eager)


def test_the_ledger_books_and_strikes_out():
    from torch._subclasses.fake_tensor import FakeTensorMode

    ledger = Ledger(64, lambda operator, arguments: 0)
    with FakeTensorMode(), ledger, ledger.labelled("kept"):
        kept = torch.empty(100)
        with ledger.labelled("passing"):
            passing = kept + 1
            view = passing[:10]
        assert ledger.held == {"kept": 448, "passing": 448}
        del passing
        assert ledger.held["passing"] == 448, "a view holds its storage"
        del view
    assert ledger.held == {"kept": 448, "passing": 0} and ledger.total == 448
    assert ledger.most[""] == 896 and ledger.at_peak[""] == {"kept": 448, "passing": 448}


def test_the_ledger_knows_what_shares_a_heap():
    from torch._subclasses.fake_tensor import FakeTensorMode

    ledger = Ledger(64, lambda operator, arguments: 0)
    with FakeTensorMode(), ledger, ledger.labelled("kept"):
        small, large = torch.empty(100), torch.empty(HEAP_BLOCK // 4)
        more = torch.empty(HEAP_BLOCK // 4 - 1000)
        assert ledger.in_heap["kept"] == ledger.held["kept"] - HEAP_BLOCK
        ledger.relabel(small, "moved")
        del more
        assert ledger.in_heap == {"kept": 0, "moved": 448} and ledger.held["kept"] == large.untyped_storage().nbytes()
    assert ledger.most_in_heap == {"kept": HEAP_BLOCK - 4000 + 32 + 448, "moved": 448}


def test_what_a_heap_keeps_follows_from_one_layer(composed):
    """Whether its activations are kept or made again, and however many layers there are."""
    found = []
    for settings in ("model.layers=1", "model.layers=5", "model.activation_checkpointing=true"):
        config, model, _, views = model_and_views(composed, "window", settings)
        found.append(rehearse(model, views, BATCH, LENGTH, config, CPU).layer)
    config, model, _, views = model_and_views(composed, "window")
    rehearsed = _Rehearsal(model, views, [0], BATCH, LENGTH, config, CPU)
    rehearsed.run()
    kept = rehearsed.held[LAYER + "local"]
    assert found[0] == found[1] and all(kept <= each < 1.2 * kept for each in found)

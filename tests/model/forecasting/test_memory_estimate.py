"""The rehearsal books what a real step keeps: held to autograd's own saved tensors, and to a step's real end."""

import itertools
from collections import Counter

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from configs.build import build_model
from kernels import fp8
from model.forecasting.fake_layouts import tensors_of
from model.forecasting.memory_estimate import (
    COPIES,
    GATHERED,
    GRADIENTS,
    LAYER,
    OPTIMIZER,
    UPDATE,
    VALIDATION,
    WEIGHTS,
    FakeStep,
    estimate_step,
)
from model.forecasting.memory_tracker import HEAP_BLOCK, MemoryTracker
from model.forecasting.muon_workspace import muon_workspace
from model.forecasting.workspace import workspace_bytes
from model.parallel.context import StandInGroup
from model.training import muon
from model.training.freezing import freeze_parameters
from tests.model.forecasting.saved import saved_by_ranks, saved_bytes
from tests.model.forecasting.test_sample import SMALL_PATTERNS
from tests.model.parallel.ranks import run_on_ranks

CPU = torch.device("cpu")
BATCH, LENGTH = 3, 64


def kept_by_layers(fake_step):
    return sum(held for label, held in fake_step.held.items() if label.startswith((LAYER, "copies of ")))


def model_and_layouts(composed, choice, *overrides):
    config, data = composed(f"attention={choice}", *SMALL_PATTERNS[choice], f"data.batch_size={BATCH}", *overrides)
    model = build_model(config, data.vocabulary).train()
    batch = data.sample(BATCH)
    return config, model, batch, model.build_layouts(batch["document"], LENGTH)


@pytest.mark.parametrize(("choice", "precision"), [*itertools.product(SMALL_PATTERNS, ["32-true", "bf16-mixed"])])
def test_activations_of_a_layer_are_what_autograd_saves(composed, choice, precision):
    """Byte by byte: what the layers of a real model keep for the backward pass, and what the tracker says they do."""
    config, model, batch, layouts = model_and_layouts(composed, choice, f"trainer.precision={precision}")
    saved = saved_bytes(model, batch["tokens"], batch["position"], layouts, precision)
    fake_step = FakeStep(model, layouts, [0], BATCH, LENGTH, config, CPU)
    fake_step.run()
    assert kept_by_layers(fake_step) == saved


def test_activations_in_fp8_are_what_autograd_saves(composed, fp8_on_cpu):
    """The operands in bf16, of which the backward pass makes its own: as many bytes as without fp8."""
    config, model, batch, layouts = model_and_layouts(composed, "window", "trainer.precision=bf16-mixed")
    model.train_in_fp8("mlp_and_head")
    config["trainer"]["fp8"] = "mlp_and_head"
    saved = saved_bytes(model, batch["tokens"], batch["position"], layouts, "bf16-mixed")
    fake_step = FakeStep(model, layouts, [0], BATCH, LENGTH, config, CPU)
    fake_step.run()
    assert kept_by_layers(fake_step) == saved


@pytest.mark.parametrize("frozen", [["layers.*.mlp.*"], ["layers.*.mlp.*", "!layers.2.mlp.*"]], ids=["all", "some"])
def test_frozen_parameters_have_no_gradient_and_no_state_in_the_forecast(composed, frozen):
    """Where layers of one pattern differ, the forecast counts the layer with the fewest frozen parameters for all."""
    overrides = "optimizer=adamw", "model.layers=3", "trainer.accumulate=2"
    config, model, _, layouts = model_and_layouts(composed, "dense", *overrides)
    whole = estimate_step(model, layouts, BATCH, LENGTH, config, CPU)
    freeze_parameters(model, frozen)
    parts = estimate_step(model, layouts, BATCH, LENGTH, config, CPU).parts
    matrices = [p for p in model.parameters() if not p.requires_grad] if len(frozen) == 1 else []
    saved = sum(4 * p.numel() for p in matrices)
    assert parts[WEIGHTS] == whole.parts[WEIGHTS]
    assert whole.parts[GRADIENTS] - parts[GRADIENTS] == saved
    assert whole.parts[OPTIMIZER] - parts[OPTIMIZER] == 2 * saved + 64 * len(matrices), "two moments, and the step"


@pytest.mark.parametrize("checkpointing", ["false", "true"])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_deeper_model_is_what_its_layers_add(composed, optimizer, checkpointing):
    """Of six layers, two kinds: from one layer of each, and fake_step whole."""
    overrides = (f"optimizer={optimizer}", f"model.activation_checkpointing={checkpointing}", "model.layers=6")
    config, data = composed(
        "attention=window_dense",
        "attention.patterns.local.width=16",
        "attention.schedule=[local,local,full]",
        *overrides,
    )
    model = build_model(config, data.vocabulary)
    layouts = model.build_layouts(data.sample(1)["document"], LENGTH)
    few = estimate_step(model, layouts, 1, LENGTH, config, CPU)

    whole = FakeStep(model, layouts, range(6), 1, LENGTH, config, CPU)
    whole.run()
    most = {phase: size for phase, size in whole.tracker.peak.items() if phase in ("update", "forward", "backward")}
    assert few.phase == max(most, key=most.get)
    assert few.total == pytest.approx(max(most.values()), rel=0.01)


def test_layers_that_differ_in_training_settings_alone_are_counted_apart(composed):
    """The warm-up of an indexer takes dense attention's memory, and the layers' patterns are equal."""
    config, data = composed("attention=routed", "attention.patterns.routed.router=indexer")
    patterns = config["attention"]["patterns"]
    patterns["warming_up"] = patterns["routed"] | {"indexer_warmup": 9}
    config["attention"]["schedule"] = ["routed", "warming_up"]
    model = build_model(config, data.vocabulary)
    assert model.patterns[0] == model.patterns[1]
    parts = estimate_step(model, model.build_layouts(data.sample(1)["document"], LENGTH), 1, LENGTH, config, CPU).parts
    assert {LAYER + "routed", LAYER + "warming_up"} <= parts.keys()


def test_weights_gradients_and_state_are_counted(composed):
    config, model, _, layouts = model_and_layouts(composed, "window", "optimizer=muon")
    fake_step = FakeStep(model, layouts, range(2), BATCH, LENGTH, config, CPU)
    fake_step.run()
    sizes = {name: p.numel() * 4 for name, p in model.named_parameters()}
    hidden = sum(size for name, size in sizes.items() if "proj" in name)
    parts = fake_step.tracker.peak_by_label["forward"]
    assert COPIES not in parts
    assert parts[GRADIENTS] == pytest.approx(sum(sizes.values()), rel=0.01)  # rounded up, one by one
    assert parts[WEIGHTS] == pytest.approx(sum(sizes.values()), rel=0.02)
    assert parts[OPTIMIZER] == pytest.approx(hidden + 2 * (sum(sizes.values()) - hidden), rel=0.02)


def test_gradients_are_held_in_the_backward_pass_where_they_are_accumulated(composed):
    config, model, _, layouts = model_and_layouts(composed, "window")
    backward = []
    for accumulate in (1, 2):
        trainer = config["trainer"] | {"accumulate": accumulate}
        fake_step = FakeStep(model, layouts, range(2), BATCH, LENGTH, config | {"trainer": trainer}, CPU)
        fake_step.run()
        backward.append(Counter(fake_step.tracker.peak_by_label["backward"])[GRADIENTS])
    assert backward[0] < backward[1]
    assert backward[1] == pytest.approx(sum(p.numel() * 4 for p in model.parameters()), rel=0.01)


def test_the_update_needs_memory_beside_that_of_a_cuda_graph(composed):
    config, model, _, layouts = model_and_layouts(composed, "window", "optimizer=muon", "trainer.validate_every=null")
    settings = [config["trainer"] | {"cuda_graph": graph} for graph in (False, True)]
    plain, graph = (
        estimate_step(model, layouts, BATCH, LENGTH, config | {"trainer": each}, CPU).parts for each in settings
    )
    assert UPDATE not in plain, "smaller than the activations"
    assert graph.pop(UPDATE) > sum(p.numel() * 2 for p in model.layers.parameters()) / model.config.layers
    assert graph == plain


@pytest.mark.parametrize(("choice", "compile"), [("window", True), ("window", False), ("routed", False)])
def test_a_validation_needs_memory_beside_that_of_a_cuda_graph(composed, choice, compile):
    """As much as one of the whole model, of which the forecast runs one layer of each pattern."""
    precision = "trainer.precision=bf16-mixed"
    config, model, batch, layouts = model_and_layouts(composed, choice, "model.layers=5", precision, "optimizer=adamw")
    settings = [config["trainer"] | {"cuda_graph": graph, "compile": compile} for graph in (False, True)]
    plain, graph = (
        estimate_step(model, layouts, BATCH, LENGTH, config | {"trainer": each}, CPU).parts for each in settings
    )
    assert graph.pop(VALIDATION) == pytest.approx(memory_of_a_validation(model, batch), rel=0.01)
    assert graph == plain


def memory_of_a_validation(model, batch):
    """The peak of the tensors that a validation's forward pass allocates, with those of its batch."""
    tracker = MemoryTracker(64, workspace_bytes)
    model.eval().collect_diagnostics(True)
    with tracker, torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        for tensor in (*model.parameters(), *model.buffers()):
            tracker.track(tensor)
        before = tracker.total
        batch = {key: batch[key].clone() for key in ("tokens", "targets", "position", "document")}
        layouts = model.build_layouts(batch["document"], LENGTH)
        for tensor in tensors_of(layouts):
            tracker.track(tensor)
        tracker.phase = "validation"
        model.loss(batch["tokens"], batch["targets"], batch["position"], layouts)
    return tracker.peak["validation"] - before


def test_compiled_layers_keep_less_and_nothing_of_the_tracing(composed):
    config, model, _, layouts = model_and_layouts(composed, "window", "trainer.precision=bf16-mixed")
    compiled = config | {"trainer": config["trainer"] | {"compile": True}}
    activations = lambda step: Counter(step.parts)[LAYER + "local"]  # noqa: E731
    eager, fused = (estimate_step(model, layouts, BATCH, LENGTH, each, CPU) for each in (config, compiled))
    assert 0.4 * activations(eager) < activations(fused) < 0.8 * activations(eager)


def test_compiled_layers_in_fp8_keep_no_more_than_in_bf16(composed, fp8_on_cpu):
    config, model, _, layouts = model_and_layouts(composed, "window", "trainer.precision=bf16-mixed")
    settings = [config["trainer"] | {"compile": True, "fp8": fp8} for fp8 in (False, "mlp")]
    steps = [FakeStep(model, layouts, [0], BATCH, LENGTH, config | {"trainer": each}, CPU) for each in settings]
    for step in steps:
        step.run()
    in_bf16, in_fp8 = map(kept_by_layers, steps)
    assert 0.7 * in_bf16 < in_fp8 <= in_bf16


def test_the_tracker_books_and_strikes_out():
    tracker = MemoryTracker(64, lambda operator, arguments: 0)
    with FakeTensorMode(), tracker, tracker.labelled("kept"):
        kept = torch.empty(100)
        with tracker.labelled("passing"):
            passing = kept + 1
            view = passing[:10]
        assert tracker.held == {"kept": 448, "passing": 448}
        del passing
        assert tracker.held["passing"] == 448, "a view holds its storage"
        del view
    assert tracker.held == {"kept": 448, "passing": 0} and tracker.total == 448
    assert tracker.peak[""] == 896 and tracker.peak_by_label[""] == {"kept": 448, "passing": 448}


def test_the_tracker_books_operands_and_result_of_a_product_in_fp8():
    tracker = MemoryTracker(64, lambda operator, arguments: 0)
    with FakeTensorMode(), tracker, tracker.labelled("kept"):
        left, right = torch.empty(32, 64, device="cuda"), torch.empty(48, 64, device="cuda")
        with tracker.fused_kernels():
            quantized = fp8.quantize(left), fp8.quantize(right)
            result = fp8.product(*quantized, torch.bfloat16, fast=True)
    assert tracker.held["kept"] == (32 + 48) * 64 * 4 + (32 + 48) * (64 + 4) + result.nbytes


def test_the_tracker_knows_what_shares_a_heap():
    tracker = MemoryTracker(64, lambda operator, arguments: 0)
    with FakeTensorMode(), tracker, tracker.labelled("kept"):
        small, large = torch.empty(100), torch.empty(HEAP_BLOCK // 4)
        more = torch.empty(HEAP_BLOCK // 4 - 1000)
        assert tracker.heap["kept"] == tracker.held["kept"] - HEAP_BLOCK
        tracker.relabel(small, "moved")
        del more
        assert tracker.heap == {"kept": 0, "moved": 448} and tracker.held["kept"] == large.untyped_storage().nbytes()
    assert tracker.heap_peak == {"kept": HEAP_BLOCK - 4000 + 32 + 448, "moved": 448}


def test_what_a_heap_keeps_follows_from_one_layer(composed):
    """Whether its activations are kept or made again, and however many layers there are."""
    found = []
    for settings in ("model.layers=1", "model.layers=5", "model.activation_checkpointing=true"):
        config, model, _, layouts = model_and_layouts(composed, "window", settings)
        found.append(estimate_step(model, layouts, BATCH, LENGTH, config, CPU).layer_heap_bytes)
    config, model, _, layouts = model_and_layouts(composed, "window")
    fake_step = FakeStep(model, layouts, [0], BATCH, LENGTH, config, CPU)
    fake_step.run()
    kept = fake_step.held[LAYER + "local"]
    assert found[0] == found[1] and all(kept <= each < 1.2 * kept for each in found)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_rank_of_a_sharded_model_holds_its_share(composed, precision):
    alone, sharded = {}, {}
    for parts, devices in ((alone, 1), (sharded, 4)):
        trainer = ("trainer.strategy=fsdp2", f"trainer.devices={devices}", f"trainer.precision={precision}")
        config, model, _, layouts = model_and_layouts(composed, "window", "model.layers=8", "optimizer=muon", *trainer)
        parts |= estimate_step(model, layouts, BATCH, LENGTH, config, CPU).parts
    for part in (WEIGHTS, OPTIMIZER, GRADIENTS):
        assert sharded[part] == pytest.approx(alone[part] / 4, rel=0.01), part
    width = 4 if precision == "32-true" else 2
    layer = width * sum(p.numel() for p in model.layers[0].parameters())
    root = 4 * (sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in model.layers.parameters()))
    assert sharded[GATHERED] in (root + 2 * layer, 2 * root + 4 * layer) and GATHERED not in alone
    assert (sharded.get(COPIES, 0) < alone.get(COPIES, 0)) == (precision == "bf16-mixed")


def test_activations_of_ranks_that_share_sequences_are_what_autograd_saves(composed):
    """Byte by byte, on two real ranks: their own tokens, and the keys and values that they have received."""
    ranks, cases, forecasts = 2, [], []
    for choice in SMALL_PATTERNS:
        config, model, batch, _ = model_and_layouts(composed, choice)
        cases.append((config, model.config.vocabulary, {key: batch[key] for key in ("tokens", "position", "document")}))
        booked = []
        for rank in range(ranks):
            context = model.share_sequences(StandInGroup(ranks, rank), LENGTH)
            layouts = model.build_layouts(batch["document"], LENGTH, context)
            fake_step = FakeStep(model, layouts, [0], BATCH, LENGTH, config, CPU)
            fake_step.run()
            booked.append(kept_by_layers(fake_step))
        forecasts.append(booked)
    measured = run_on_ranks(saved_by_ranks, ranks, cases)
    assert [list(rank) for rank in zip(*forecasts, strict=True)] == measured


@pytest.mark.parametrize("stack_bytes", [2**28, 6 * 2 * 256 * 2048])
def test_muon_stacks_the_matrices_of_all_layers(composed, monkeypatch, stack_bytes):
    """Of six equal layers, from one, where the update has the peak: all matrices of a shape at once, or six."""
    monkeypatch.setattr(muon, "STACK_BYTES", stack_bytes)
    sizes = ("model.width=256", "model.mlp_width=2048", "model.layers=6")
    config, data = composed("attention=window", "attention.patterns.local.width=16", "optimizer=muon", *sizes)
    model = build_model(config, data.vocabulary)
    layouts = model.build_layouts(data.sample(1)["document"], LENGTH)
    few = estimate_step(model, layouts, 1, LENGTH, config, CPU)
    whole = FakeStep(model, layouts, range(6), 1, LENGTH, config, CPU)
    whole.run()
    assert few.phase == "update"
    assert few.total == pytest.approx(whole.tracker.peak["update"], rel=0.01)


def test_a_rank_of_a_sharded_model_orthogonalizes_its_share():
    matrix = torch.nn.Parameter(torch.zeros(64, 32))
    optimizer = muon.Muon([matrix], lr=0.01)
    alone, rank = (muon_workspace(optimizer, {id(matrix): 8}, n, CPU, FakeTensorMode(), 64) for n in (1, 4))
    rows = 2 * 8 * 64 * 32 // 4  # bf16 bytes of a rank's rows of all matrices
    assert alone > 4 * rows
    assert rank == pytest.approx(alone / 4 + 3 * rows, abs=rows), "and what is sent, received and put together"


def test_gradients_stay_in_the_buckets_of_data_parallelism(composed):
    held = {}
    for devices in (1, 2):
        trainer = ("trainer.strategy=ddp", f"trainer.devices={devices}")
        config, model, _, layouts = model_and_layouts(composed, "window", *trainer)
        step = FakeStep(model, layouts, range(2), BATCH, LENGTH, config, CPU)
        step.run()
        held[devices] = Counter(step.tracker.peak_by_label["backward"])[GRADIENTS]
    gradients = 4 * sum(p.numel() for p in model.parameters())
    assert held[1] < gradients and held[2] == pytest.approx(gradients, rel=0.01)

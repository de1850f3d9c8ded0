"""Compiled layers: one graph for all of them, none more when documents change, and the same numbers."""

import copy
import dataclasses
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from kernels.patterns import Dense, Hierarchical, NativeSparse, Routed, Window
from model import Transformer
from tests.kernels.oracle import packing
from tests.model.small import INDEXER, config, lively, plan

ROUTER: dict[str, Any] = dict(
    window=5,
    block=16,
    top_k=2,
    router="indexer",
    share="group",
    first_block=False,
    indexer_dim=4,
)
PLANS = {
    "dense": plan(Dense()),
    "window": plan(Window(7, sink_tokens=1)),
    "hierarchical": plan(Hierarchical(8, (4, 16), (32,), "learned")),
    "routed": plan(Routed(**ROUTER), indexer=dataclasses.replace(INDEXER, indexer_warmup=2)),
    "native_sparse": plan(NativeSparse(**ROUTER, summary_span=8, pooling="learned", combine="gates")),
}
TOKENS = torch.randint(64, (2, 96), generator=torch.Generator().manual_seed(0))
PACKINGS = [packing([96], [60, 36]), packing([40, 56], [95, 1]), packing([10, 20, 66], [1, 1, 94])]


@pytest.fixture
def graphs(monkeypatch) -> CompileCounterWithBackend:
    """Counts the graphs of torch.compile, and runs them as they were traced, without the compiler behind it."""
    counter = CompileCounterWithBackend("eager")
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda *a, **settings: compile_(*a, **settings, backend=counter))
    torch._dynamo.reset()
    yield counter
    torch._dynamo.reset()


def step(
    model: Transformer, document: torch.Tensor | None, number: int, tokens: torch.Tensor = TOKENS
) -> dict[str, torch.Tensor]:
    """The loss and gradients of one training step."""
    model.set_step(number)
    model.zero_grad()
    device = tokens.device
    layouts = model.build_layouts(document, tokens.shape[1])
    position = torch.arange(tokens.shape[1], device=device).expand(tokens.shape)
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        out = model.loss(tokens, tokens.roll(-1, 1), position, layouts)
    (out.total if out.auxiliary is None else out.total + out.auxiliary).backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": out.total.detach(), **gradients}


@pytest.mark.parametrize(
    ("name", "checkpointing"),
    [*((name, False) for name in PLANS), ("window", True), ("native_sparse", True), ("routed", "selective")],
)
def test_all_layers_and_batches_share_one_graph_and_give_the_same_numbers(name, checkpointing, graphs):
    sizes = config(sink_logits=True, activation_checkpointing=checkpointing)
    model = lively(Transformer(sizes, PLANS[name]).double()).train()
    wanted = [step(model, document, number) for number, document in enumerate(PACKINGS)]
    model.compile_layers()
    for number, document in enumerate(PACKINGS):
        actual = step(model, document, number)
        assert actual.keys() == wanted[number].keys()
        for key, value in actual.items():
            torch.testing.assert_close(
                value, wanted[number][key], rtol=1e-9, atol=1e-9, msg=lambda m, k=key: f"{k}: {m}"
            )
    assert graphs.frame_count == (2 if name == "routed" else 1)  # an indexer's warm-up ends at step 2


def test_layers_in_fp8_share_one_graph(graphs, fp8_on_cpu):
    model = lively(Transformer(config(), PLANS["window"])).train()
    model.train_in_fp8("mlp_and_head")
    wanted = [step(model, document, 0) for document in PACKINGS]
    model.compile_layers()
    for number, document in enumerate(PACKINGS):
        actual = step(model, document, 0)
        for key, value in actual.items():
            difference = (value - wanted[number][key]).norm() / wanted[number][key].norm()
            assert difference < 1e-2, f"{key}: {difference}"  # rounding in float32 moves few numbers to a neighbour
    assert graphs.frame_count == 1


def test_two_patterns_are_two_graphs(graphs):
    patterns = {"local": Window(7), "full": Dense()}
    model = Transformer(config(layers=3), plan(patterns, ["local", "full", "local"])).double().train()
    model.compile_layers()
    step(model, PACKINGS[1], 0)
    assert graphs.frame_count == 2


def test_a_phase_of_training_is_one_graph_more_beyond_the_limit_of_pytorch(graphs):
    """Sequences and windows grow four times; recompilations are limited to two elsewhere."""
    model = Transformer(config(), plan(Window(4))).double().train()
    with torch._dynamo.config.patch(recompile_limit=2):
        model.compile_layers(phases=4)
        for number in range(4):
            model.set_plan(plan(Window(4 + number)))
            tokens = TOKENS[:, :64].reshape(8 >> number, 16 << number)
            for end in (5, 9):
                step(model, (torch.arange(tokens.shape[1]) > end).int().expand(tokens.shape), 0, tokens)
            assert graphs.frame_count == number + 1


def test_evaluation_runs_without_the_compiler(graphs):
    model = Transformer(config(), plan(Window(7))).double().eval()
    model.compile_layers()
    for length in (16, 33, 48):
        tokens = torch.zeros(1, length, dtype=torch.int64)
        model(tokens, torch.arange(length)[None], model.build_layouts(None, length))
    assert graphs.frame_count == 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("checkpointing", [False, "selective"])
@pytest.mark.parametrize("name", PLANS)
def test_a_compiled_step_on_a_gpu_waits_for_nothing_and_is_as_exact_as_the_plain_one(name, checkpointing):
    """With the compiler, in bf16, in a mode in which waiting for the device is an error; documents change. Both steps
    are compared with float64 on the CPU."""
    sizes = config(width=64, head_dim=32, mlp_width=128, sink_logits=True, activation_checkpointing=checkpointing)
    model = lively(Transformer(sizes, PLANS[name])).train()
    exact = [step(copy.deepcopy(model).double(), document, 2) for document in (None, *PACKINGS)]
    model, tokens = model.cuda(), TOKENS.cuda()
    documents = [None, *(document.cuda() for document in PACKINGS)]
    plain = [step(model, document, 2, tokens) for document in documents]
    torch._dynamo.reset()
    model.compile_layers()
    for document in documents[:2]:
        step(model, document, 2, tokens)
    torch.cuda.set_sync_debug_mode("error")
    try:
        compiled = [step(model, document, 2, tokens) for document in documents]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for wanted, *both in zip(exact, plain, compiled, strict=True):
        norms = {key: value.norm() for key, value in wanted.items()}
        errors = [{key: (values[key].cpu().double() - wanted[key]).norm() for key in wanted} for values in both]
        for key, error in errors[1].items():
            assert error < 0.2 * norms[key], f"{key}: {error / norms[key]}"  # bf16 gives a few hundredths
        whole = [sum(error[key] ** 2 for key in wanted) ** 0.5 for error in errors]
        assert whole[1] < 1.5 * whole[0]

"""Compiled layers: one graph for all of them, none more when documents change, and the same numbers."""

from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from kernels import Axis
from kernels.patterns import Dense, Hierarchical, NativeSparse, Pattern, Routed, Window
from model import Transformer
from model.attention import build_view
from tests.kernels.oracle import packing
from tests.model.small import config, lively, plan, positions_of

ROUTER: dict[str, Any] = dict(
    window=5,
    block=16,
    top_k=2,
    router="indexer",
    share="group",
    first_block=False,
    indexer_dim=4,
    indexer_loss=0.7,
    indexer_warmup=2,
    indexer_gradient=False,
)
PATTERNS: dict[str, Pattern] = {
    "dense": Dense(),
    "window": Window(7, sink_tokens=1),
    "hierarchical": Hierarchical(8, (4, 16), (32,), "learned"),
    "routed": Routed(**ROUTER),
    "native_sparse": NativeSparse(**ROUTER | {"indexer_warmup": 0}, summary_span=8, pooling="learned", combine="gates"),
}
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


def step(model: Transformer, document: torch.Tensor, number: int) -> dict[str, torch.Tensor]:
    """The loss and gradients of one training step, under layouts of fixed sizes as on a GPU."""
    model.set_step(number)
    model.zero_grad()
    tokens = torch.randint(64, document.shape, generator=torch.Generator().manual_seed(number))
    axis = Axis.tokens(document.shape[1], document)
    views = {p: build_view(p, axis, model.plan.block, fixed=True) for p in dict.fromkeys(model.patterns)}
    out = model.loss(tokens, tokens.roll(-1, 1), positions_of(document), [views[p] for p in model.patterns])
    (out.total if out.auxiliary is None else out.total + out.auxiliary).backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": out.total.detach(), **gradients}


@pytest.mark.parametrize(
    ("name", "checkpointing"), [*((name, False) for name in PATTERNS), ("window", True), ("native_sparse", True)]
)
def test_all_layers_and_batches_share_one_graph_and_give_the_same_numbers(name, checkpointing, graphs):
    sizes = config(sink_logits=True, activation_checkpointing=checkpointing)
    model = lively(Transformer(sizes, plan(PATTERNS[name])).double()).train()
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


def test_two_patterns_are_two_graphs(graphs):
    patterns = {"local": Window(7), "full": Dense()}
    model = Transformer(config(layers=3), plan(patterns, ["local", "full", "local"])).double().train()
    model.compile_layers()
    step(model, PACKINGS[1], 0)
    assert graphs.frame_count == 2


def test_evaluation_runs_without_the_compiler(graphs):
    model = Transformer(config(), plan(Window(7))).double().eval()
    model.compile_layers()
    for length in (16, 33, 48):
        tokens = torch.zeros(1, length, dtype=torch.int64)
        model(tokens, torch.arange(length)[None], model.build_layouts(None, length))
    assert graphs.frame_count == 0

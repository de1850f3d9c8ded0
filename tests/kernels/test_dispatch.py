"""One rule chooses the backend of every operation, and one form of error refuses it."""

import importlib
import importlib.util

import pytest
import torch

from kernels import Axis, Selection, attention, block_mass, build_layout, dispatch
from kernels.dispatch import CAPTURABLE, OPERATIONS, choose, triton_refusal
from kernels.patterns import Window

every_operation = pytest.mark.parametrize("operation", OPERATIONS)
PAIRS = [(operation, backend) for operation, candidates in OPERATIONS.items() for backend in candidates.modules]


@pytest.mark.parametrize(("operation", "backend"), PAIRS)
def test_every_candidate_has_its_module(operation, backend):
    assert importlib.util.find_spec(OPERATIONS[operation].modules[backend]) is not None


@every_operation
def test_auto_takes_triton_on_a_gpu_where_it_serves_and_pytorch_elsewhere(operation):
    portable = OPERATIONS[operation].portable
    assert choose(operation, "auto", True, lambda name: None) == "triton"
    assert choose(operation, "auto", True, lambda name: "head_dim 24: must be 32") == portable
    assert choose(operation, "auto", False, lambda name: None) == portable != "triton"


@every_operation
def test_a_named_backend_is_taken_or_refused(operation):
    names = ", ".join(OPERATIONS[operation].modules)
    assert choose(operation, "triton", False, lambda name: None) == "triton"
    with pytest.raises(ValueError, match="backend='triton' cannot serve this call: dtype x: must be y"):
        choose(operation, "triton", True, lambda name: "dtype x: must be y")
    with pytest.raises(ValueError, match=f"backend='fast': must be one of auto, {names} for {operation}"):
        choose(operation, "fast", True, lambda name: None)


@pytest.mark.parametrize("operation", [name for name in OPERATIONS if name != "attention"])
def test_without_the_package_triton_a_gpu_runs_pytorch(operation, monkeypatch):
    monkeypatch.setattr(dispatch, "has_triton", lambda: False)
    refusal = lambda name: triton_refusal(operation, name, "cuda", torch.float16)  # noqa: E731
    assert choose(operation, "auto", True, refusal) == OPERATIONS[operation].portable
    with pytest.raises(ValueError, match=r"backend='triton'.*the package triton is not installed"):
        choose(operation, "triton", True, refusal)


@pytest.mark.parametrize("passes", [("blocked", "blocked"), ("triton", "flash"), ("flash", "hopper")])
def test_a_backend_whose_capture_is_unknown_is_refused_in_a_cuda_graph(passes, monkeypatch):
    """By name, and before it runs: `auto` may choose FlashAttention-4 for each of both passes. Outside it runs."""
    ran: list[str] = []

    class Recorded:
        def __init__(self, name: str) -> None:
            self.name = name

        def forward(self, q, k, v, layout, scale):
            ran.append(self.name)
            return torch.zeros_like(q), q.new_zeros(q.shape[:3])

        def backward(self, grad_out, grad_lse, q, k, v, out, lse, layout, scale):
            ran.append(self.name)
            return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)

    module = importlib.import_module("kernels.attention")  # `kernels.attention` is the function
    monkeypatch.setattr(module, "choose_backends", lambda *_: passes)
    monkeypatch.setattr(module, "_module", Recorded)
    q = torch.randn(1, 2, 32, 8, requires_grad=True)
    layout = build_layout(Window(8), Axis.tokens(32), block=16)
    attention(q, q, q, layout).sum().backward()
    assert ran == list(passes)
    monkeypatch.setattr(dispatch, "is_captured", lambda x: True)
    unknown = next(name for name in passes if name not in CAPTURABLE)
    with pytest.raises(
        RuntimeError, match=f"^backend='{unknown}' of attention in a CUDA graph: must be triton or hopper$"
    ):
        attention(q, q, q, layout).sum().backward()
    assert ran[2:] == list(passes[: passes.index(unknown)])


def test_chosen_blocks_are_attended_to_by_triton_alone_in_a_cuda_graph(monkeypatch):
    q, chosen = torch.randn(1, 1, 32, 8, requires_grad=True), torch.zeros(1, 1, 32, 1, dtype=torch.int32)
    selection = Selection.from_chosen(chosen, 32, 16)
    out, lse = attention(q, q, q, selection, return_lse=True)
    monkeypatch.setattr(dispatch, "is_captured", lambda x: True)
    for call in (
        lambda: attention(q, q, q, selection),
        lambda: out.sum().backward(),
        lambda: block_mass(q, q, lse, selection),
    ):
        with pytest.raises(RuntimeError, match=r"^backend='blocked' of selected_attention .*must be triton$"):
            call()

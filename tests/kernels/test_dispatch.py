"""One rule chooses the backend of every operation, and one form of error refuses it."""

import importlib.util

import pytest
import torch

from kernels import dispatch
from kernels.dispatch import OPERATIONS, choose, triton_refusal

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

"""The self-check passes a right backend, and stops a wrong one with advice."""

import importlib
from types import ModuleType

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from kernels import selfcheck
from kernels.backends import blocked, gathered

PROBLEM = selfcheck.Problem(torch.device("cpu"), torch.float32, head_dim=16, group=2, block=32)


def broken(forward=blocked.forward, backward=blocked.backward, name="broken") -> ModuleType:
    module = ModuleType(name)
    module.forward, module.backward = forward, backward
    return module


def test_a_right_backend_is_exact_up_to_rounding():
    assert max(selfcheck.errors(blocked, PROBLEM).values()) < 1e-5
    assert selfcheck.failure(blocked, PROBLEM) is None


@pytest.mark.parametrize(("index", "name"), [(0, "gradient of q"), (1, "gradient of k"), (2, "gradient of v")])
def test_a_wrong_gradient_is_named(index, name):
    def backward(*args):
        grads = list(blocked.backward(*args))
        grads[index] = grads[index] * 1.01
        return grads

    found = selfcheck.failure(broken(backward=backward), PROBLEM)
    assert f"wrong {name}" in found and "TRITON_PTXAS_PATH" in found


@pytest.mark.parametrize("wrong", [float("nan"), 1.5])
def test_a_wrong_output_is_named(wrong):
    def forward(*args):
        out, lse = blocked.forward(*args)
        return out * wrong, lse

    assert "wrong output" in selfcheck.failure(broken(forward=forward), PROBLEM)


def test_a_kernel_that_cannot_be_compiled_is_named_with_the_reason():
    def forward(*args):
        raise RuntimeError("PTXAS error: no such instruction\nptxas -v ...")

    found = selfcheck.failure(broken(forward, name="kernels.backends.triton.dense"), PROBLEM)
    assert found.startswith("attention.backend=triton does not run on cpu")
    assert "RuntimeError: PTXAS error: no such instruction. Try" in found

    def without_memory(*args):
        raise torch.OutOfMemoryError("of the run itself")

    with pytest.raises(torch.OutOfMemoryError):
        selfcheck.failure(broken(forward=without_memory), PROBLEM)


def test_it_can_be_switched_off(monkeypatch):
    monkeypatch.setenv("FARSIGHT_SELF_CHECK", "0")
    assert selfcheck.failure(broken(forward=None), PROBLEM) is None


def test_attention_on_a_selection_is_checked_too():
    assert max(selfcheck.selection_errors(gathered, PROBLEM).values()) < 1e-5
    selfcheck.check_selection(gathered, PROBLEM)

    def backward(*args):
        grad_q, grad_k, grad_v = gathered.backward(*args)
        return grad_q, grad_k.roll(1, 2), grad_v

    with pytest.raises(selfcheck.SelfCheckError, match="wrong gradient of k"):
        selfcheck.check_selection(broken(gathered.forward, backward), PROBLEM)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_it_works_where_an_evaluation_comes_first(mode):
    """No gradients are wanted there, and the check wants some."""
    with mode():
        assert max(selfcheck.errors(blocked, PROBLEM).values()) < 1e-5
        assert max(selfcheck.errors(blocked, PROBLEM, plain=True).values()) < 1e-5
        assert max(selfcheck.selection_errors(gathered, PROBLEM).values()) < 1e-5


def test_within_a_checkpointed_layer_it_is_no_part_of_the_layer():
    """The recomputation does not check again: what the check saved must not be missed there."""
    masks, choices = broken(), broken(gathered.forward, gathered.backward)  # right, and not checked before

    def layer(x):
        assert selfcheck.failure(masks, PROBLEM) is None
        selfcheck.check_selection(choices, PROBLEM)
        return (x * x).sum()

    x = torch.randn(5, requires_grad=True)
    checkpoint(layer, x, use_reentrant=False).backward()
    assert torch.equal(x.grad, 2 * x)


class OnCuda:
    """What `attention()` asks a tensor on a GPU before its kernels run."""

    is_cuda, device, dtype, shape = True, torch.device("cpu"), torch.bfloat16, (1, 2, 64, 16)


@pytest.mark.parametrize(
    ("forward", "message"),
    [(lambda *args: [t * 2 for t in blocked.forward(*args)], "wrong output"), (None, "does not run on cpu")],
)
def test_auto_replaces_hoppers_kernels_that_fail_the_check_and_warns_once(monkeypatch, caplog, forward, message):
    module = importlib.import_module("kernels.attention")  # the name in the package is the function
    wrong = broken(forward=forward)
    monkeypatch.setattr(module, "_module", lambda name: wrong if name == "hopper" else blocked)
    module._warn_once.cache_clear()
    for _ in range(2):
        assert module._checked("hopper", True, OnCuda, OnCuda, 32) == "triton"
    assert caplog.text.count(message) == 1
    with pytest.raises(selfcheck.SelfCheckError, match=message):
        module._checked("hopper", False, OnCuda, OnCuda, 32)
    assert module._checked("triton", True, OnCuda, OnCuda, 32) == "triton"

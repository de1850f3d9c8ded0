"""The Triton kernels of SwiGLU against PyTorch in float64, values and gradients."""

import pytest
import torch
from torch.nn import functional as F

triton = pytest.importorskip("triton")

from kernels.backends.triton.swiglu import swiglu, swiglu_backward  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROUNDING = {torch.float32: 2.0**-23, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


def problem(shape, dtype):
    generator = torch.Generator().manual_seed(shape[-1])
    joined = 3 * torch.randn(*shape[:-1], 2 * shape[-1], generator=generator)
    return joined.to(dtype), torch.randn(shape, generator=generator).to(dtype)


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((2, 3, 5), torch.float32), ((1, 512), torch.bfloat16), ((9, 513), torch.float16), ((7, 1200), torch.bfloat16)],
)
def test_equals_the_oracle(shape, dtype):
    joined, grad = problem(shape, dtype)
    leaf = joined.double().requires_grad_()
    gate, up = leaf.chunk(2, -1)
    wanted = F.silu(gate) * up
    wanted.backward(grad.double())
    error = dict(rtol=2 * ROUNDING[dtype], atol=1e-5)
    torch.testing.assert_close(swiglu(joined.to(DEVICE)).cpu().double(), wanted.detach(), **error)
    actual = swiglu_backward(grad.to(DEVICE), joined.to(DEVICE)).cpu().double()
    torch.testing.assert_close(actual, leaf.grad, **error)


def test_of_strided_inputs_and_of_no_rows():
    joined, grad = problem((6, 40), torch.float32)
    wide, grads = torch.stack([joined, -joined], 1).to(DEVICE), torch.stack([grad, -grad], 1).to(DEVICE)
    torch.testing.assert_close(swiglu(wide[:, 0]), swiglu(joined.to(DEVICE)))
    expected = swiglu_backward(grad.to(DEVICE), joined.to(DEVICE))
    torch.testing.assert_close(swiglu_backward(grads[:, 0], wide[:, 0]), expected)
    assert swiglu(joined[:0].to(DEVICE)).shape == (0, 40)


def test_the_largest_gates_do_not_overflow():
    joined = torch.tensor([[1e4, -1e4, 2.0, 3.0]])
    assert swiglu(joined.to(DEVICE)).cpu().tolist() == [[2e4, 0.0]]
    found = swiglu_backward(torch.ones(1, 2).to(DEVICE), joined.to(DEVICE)).cpu().tolist()
    assert found == [[2.0, 0.0, 1e4, 0.0]]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_the_operator_and_its_gradient_on_a_gpu():
    from kernels.swiglu import swiglu as operator

    joined, grad = (x.cuda() for x in problem((64, 2432), torch.bfloat16))
    leaf, exact = joined.requires_grad_(), joined.detach().double().requires_grad_()
    torch.compile(operator, fullgraph=True)(leaf).backward(grad)
    operator(exact).backward(grad.double())
    torch.testing.assert_close(leaf.grad.double(), exact.grad, rtol=2.0**-7, atol=1e-5)

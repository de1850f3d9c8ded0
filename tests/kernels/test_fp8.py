"""Products in fp8 against float64 products of numbers that the oracle rounds, on a CPU and on a GPU."""

import pytest
import torch
from torch.nn import functional as F

from kernels import fp8
from tests.kernels import fp8_oracle as oracle

GPU = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 9), reason="needs CUDA, capability 8.9"
)


def numbers(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Normal numbers in rows of very different sizes, and in each row a few that are a thousandth as large."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator) * 10.0 ** torch.linspace(-9, 4, shape[0])[:, None]
    return x.where(torch.rand(shape, generator=generator) > 0.1, x / 1000).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_quantized_numbers_are_the_nearest_with_a_power_of_two_a_row(dtype):
    x = numbers(40, 300, dtype=dtype)
    values, scale = fp8.quantize(x)
    assert (values.dtype, scale.dtype, scale.shape) == (torch.float8_e4m3fn, torch.float32, (40, 1))
    assert (torch.frexp(scale)[0] == 0.5).all(), "powers of two"
    quantized, exact = values.double() * scale.double(), x.double()
    torch.testing.assert_close(quantized, oracle.rounded(exact), rtol=0, atol=0)
    largest = exact.abs().amax(1, keepdim=True)
    error = (quantized - exact).abs()
    bound = torch.where(exact.abs() >= 2.0**-13 * largest, exact.abs() / 16, 2.0**-17 * largest)
    assert (error <= bound).all() and (error > 0.7 * bound).any()


def test_a_row_is_quantized_alone():
    """So a token's numbers do not depend on later tokens or on other documents."""
    x = numbers(20, 64)
    values, scale = fp8.quantize(x)
    changed = fp8.quantize(torch.cat([x[:10], 1e6 * x[10:]]))
    assert torch.equal(values[:10].float(), changed.values[:10].float())
    assert torch.equal(scale[:10], changed.scale[:10])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_number_of_a_row_overflows_and_a_row_of_zeros_stays(dtype):
    """The largest numbers around each step of the scale, and the smallest and largest that the dtype has."""
    steps = 448 * 2.0 ** torch.arange(-40, 40)
    largest = torch.cat([steps, steps * (1 + torch.finfo(dtype).eps), steps * (1 - torch.finfo(dtype).eps)])
    extreme = torch.tensor([0.0, torch.finfo(dtype).tiny, 2.0**-100, torch.finfo(dtype).max])
    x = torch.cat([largest, extreme])[:, None].to(dtype)
    values, scale = fp8.quantize(torch.cat([x, -x], 1))
    assert values.float().isfinite().all() and scale.isfinite().all() and (scale > 0).all()
    quantized = values.double() * scale.double()
    torch.testing.assert_close(quantized[:-3], torch.cat([x, -x], 1).double()[:-3], rtol=1 / 16, atol=0)
    assert not quantized[len(largest)].any()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_stays_so_in_its_row_alone(value, fp8_on_cpu):
    x, weight = torch.ones(4, 32), torch.ones(16, 32)
    x[1, 3] = value
    found = fp8.linear(x, weight)
    assert not found[1].isfinite().any() and (found[[0, 2, 3]] == 32).all()


def test_the_product_and_its_gradients_are_those_of_the_rounded_operands(fp8_on_cpu):
    x, weight = numbers(24, 48, seed=1).reshape(2, 12, 48), numbers(32, 48, seed=2)
    grad = numbers(24, 32, seed=3).reshape(2, 12, 32)
    leaves = x.requires_grad_(), weight.requires_grad_()
    found = fp8.linear(*leaves)
    found.backward(grad)
    flat = [each.detach().double().flatten(0, -2) for each in (x, weight, grad)]
    for actual, expected in zip((found, x.grad, weight.grad), oracle.linear(*flat), strict=True):
        actual = actual.detach().double().flatten(0, -2)
        assert_near(actual, expected, 1e-6)
    exact = flat[0] @ flat[1].T
    assert 0.005 < (oracle.linear(*flat)[0] - exact).norm() / exact.norm() < 0.05, "rounding makes a difference"


def assert_near(actual: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    """Row by row, because rows differ in size."""
    error = (actual - expected).norm(dim=1) / expected.norm(dim=1)
    assert error.max() < tolerance, error


def test_under_autocast_results_are_bf16_and_gradients_keep_their_dtype(fp8_on_cpu):
    x, weight = torch.randn(32, 48, requires_grad=True), torch.randn(16, 48, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        found = fp8.linear(x, weight)
        found.sum().backward()
    assert found.dtype == torch.bfloat16 and x.grad.dtype == weight.grad.dtype == torch.float32
    expected, *_ = oracle.linear(x.detach().bfloat16().double(), weight.detach().double(), found.detach().double())
    assert_near(found.detach().double(), expected, 2.0**-8)


@pytest.mark.parametrize("compiled", [False, True])
def test_several_weights_are_one_product(compiled, fp8_on_cpu):
    x, weights = numbers(24, 48, seed=1), [numbers(rows, 48, seed=2 + rows) for rows in (32, 16)]
    grad = numbers(24, 48, seed=3)
    leaves = [each.requires_grad_() for each in (x, *weights)]
    linear = torch.compile(fp8.linear, fullgraph=True, backend="aot_eager") if compiled else fp8.linear
    found = linear(*leaves)
    found.backward(grad)
    oracles = oracle.linear(x.detach().double(), torch.cat(weights).detach().double(), grad.double())
    gradients = x.grad, torch.cat([weight.grad for weight in weights])
    for actual, expected in zip((found.detach(), *gradients), oracles, strict=True):
        assert_near(actual.double(), expected, 1e-6)


@pytest.mark.parametrize("which", [0, 1, 2])
def test_a_frozen_operand_gets_no_gradient(which, fp8_on_cpu):
    leaves = [numbers(16, 32), numbers(32, 32), numbers(16, 32)]
    others = [leaf.requires_grad_() for number, leaf in enumerate(leaves) if number != which]
    fp8.linear(*leaves).sum().backward()
    assert leaves[which].grad is None and all(leaf.grad is not None for leaf in others)


def test_a_cpu_is_refused():
    with pytest.raises(ValueError, match=r"^products in fp8 on cpu: must be on a GPU$"):
        fp8.linear(torch.ones(16, 16), torch.ones(16, 16))


@pytest.mark.gpu
@GPU
@pytest.mark.parametrize("compiled", [False, True])
def test_on_a_gpu_the_product_and_its_gradients_are_those_of_the_rounded_operands(compiled):
    """Eager and compiled, in bf16, whose rounding gives 0.0017. The sums of the first product have 14 bits."""
    torch.manual_seed(0)
    x, weight, grad = torch.randn(512, 768), torch.randn(1024, 768), torch.randn(512, 1024)
    x, grad = x.bfloat16(), grad.bfloat16()
    leaves = [x.cuda().requires_grad_(), weight.cuda().requires_grad_()]
    linear = torch.compile(fp8.linear, fullgraph=True) if compiled else fp8.linear
    found = linear(*leaves)
    found.backward(grad.cuda())
    results = [each.detach().cpu().double() for each in (found, *(leaf.grad for leaf in leaves))]
    expected = oracle.linear(x.double(), weight.double(), grad.double())
    for actual, wanted, tolerance in zip(results, expected, (0.01, 0.003, 0.003), strict=True):
        assert (actual - wanted).norm() < tolerance * wanted.norm()
    assert (results[0] - F.linear(x.double(), weight.double())).norm() > 0.02 * results[0].norm()

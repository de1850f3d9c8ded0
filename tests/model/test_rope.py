"""Rotary embeddings: relative, exact far out, and scaled as the papers say."""

import math

import pytest
import torch

from model.rope import RotaryEmbedding, rotate
from tests.model.small import config

HALF = 4  # of head_dim 8


def rotary(**changes) -> RotaryEmbedding:
    return RotaryEmbedding(config(**changes))


def test_scores_depend_on_distance_alone():
    rope, generator = rotary(), torch.Generator().manual_seed(0)
    q, k = torch.randn(8, generator=generator), torch.randn(8, generator=generator)

    def score(query: int, key: int) -> float:
        cos, sin = rope(torch.tensor([[query, key]]))
        turned = rotate(torch.stack([q, k])[None, :, None], cos, sin)[0, :, 0]
        return float(turned[0] @ turned[1])

    for distance in (0, 1, 17, 300):
        scores = [score(start + distance, start) for start in (0, 1, 50, 999, 10**6)]
        assert max(scores) - min(scores) < 2e-6
    assert abs(score(5, 5) - float(q @ k)) < 1e-6
    assert abs(score(6, 5) - score(5, 5)) > 1e-2


def test_pairs_are_turned_as_complex_numbers():
    """Element i and i + head_dim / 2 are one complex number: the Qwen and Llama convention, not the interleaved one."""
    x = torch.randn(1, 3, 2, 8, generator=torch.Generator().manual_seed(0))
    turned = rotate(x, *rotary()(torch.tensor([[0, 5, 77]])))
    for index, position in enumerate((0, 5, 77)):
        angles = torch.tensor([position * 10000.0 ** (-i / HALF) for i in range(HALF)], dtype=torch.float64)
        expected = torch.complex(*x[0, index].double().chunk(2, -1)) * torch.polar(torch.ones_like(angles), angles)
        torch.testing.assert_close(
            turned[0, index].double(), torch.cat([expected.real, expected.imag], -1), rtol=0, atol=1e-6
        )


def test_rotation_keeps_length_and_dtype():
    x = torch.randn(1, 4, 2, 8, generator=torch.Generator().manual_seed(0))
    angles = rotary()(torch.arange(4)[None])
    torch.testing.assert_close(rotate(x, *angles).norm(dim=-1), x.norm(dim=-1))
    assert rotate(x.bfloat16(), *angles).dtype == torch.bfloat16


def test_angles_are_exact_at_position_one_million():
    position = 10**6
    cos, sin = rotary()(torch.tensor([[position]]))
    assert cos.dtype == sin.dtype == torch.float32 and cos.shape == (1, 1, 1, HALF)
    for i in range(HALF):
        angle = math.fmod(position * 10000.0 ** (-i / HALF), 2 * math.pi)
        assert abs(float(cos[..., i]) - math.cos(angle)) < 1e-7
        assert abs(float(sin[..., i]) - math.sin(angle)) < 1e-7
    wide = RotaryEmbedding(config(head_dim=128))
    in_float32 = (position * wide.frequencies.float()).cos()
    assert (in_float32 - wide(torch.tensor([[position]]))[0].flatten()).abs().max() > 1e-3  # what float32 would give


def test_ntk_stretches_the_slowest_frequency_by_the_factor_and_keeps_the_fastest():
    rope = rotary(rope_scaling="ntk", rope_factor=4.0)
    base = 10000.0 * 4.0 ** (8 / (8 - 2))  # b * s^(d / (d - 2)): bloc97 2023
    direct = torch.tensor([base ** (-2 * i / 8) for i in range(HALF)], dtype=torch.float64)
    torch.testing.assert_close(rope.frequencies, direct, rtol=1e-12, atol=0)
    plain = rotary().frequencies
    assert rope.frequencies[0] == plain[0] == 1 and rope.magnitude == 1
    assert float(plain[-1] / rope.frequencies[-1]) == pytest.approx(4)


def test_yarn_is_the_papers_formula():
    """Equations 17 to 23 of Peng et al. 2023, with their alpha = 1 and beta = 32."""
    theta, factor, original, head_dim = 10000.0, 8.0, 1024, 64
    rope = RotaryEmbedding(
        config(rope_scaling="yarn", rope_factor=factor, rope_original_length=original, head_dim=head_dim)
    )
    kept = stretched = between = 0
    for d in range(head_dim // 2):
        plain = theta ** (-2 * d / head_dim)
        rotations = original / (2 * math.pi / plain)
        if rotations < 1:
            ramp, stretched = 0.0, stretched + 1
        elif rotations > 32:
            ramp, kept = 1.0, kept + 1
        else:
            ramp, between = (rotations - 1) / (32 - 1), between + 1
        assert float(rope.frequencies[d]) == pytest.approx((1 - ramp) * plain / factor + ramp * plain, rel=1e-12)
    assert kept and stretched and between
    assert rope.magnitude == pytest.approx(0.1 * math.log(factor) + 1)
    cos, sin = rope(torch.tensor([[3]]))
    assert float((cos**2 + sin**2).sqrt().mean()) == pytest.approx(rope.magnitude, rel=1e-6)


@pytest.mark.parametrize("scaling", ["none", "ntk", "yarn"])
def test_a_factor_of_one_scales_nothing(scaling):
    rope = rotary(rope_scaling=scaling, rope_factor=1.0)
    torch.testing.assert_close(rope.frequencies, rotary().frequencies, rtol=1e-14, atol=0)
    assert rope.magnitude == 1


def test_converting_the_model_does_not_round_frequencies():
    rope, exact = rotary(), rotary().frequencies
    for convert in (torch.nn.Module.bfloat16, torch.nn.Module.half, torch.nn.Module.double):
        assert torch.equal(convert(rope).frequencies, exact) and rope.frequencies.dtype == torch.float64
    assert not rope.state_dict()


def test_a_model_built_on_meta_finds_its_frequencies_when_it_gets_memory():
    with torch.device("meta"):
        rope = rotary(rope_scaling="yarn", rope_factor=2.0)
    rope.to_empty(device="cpu")
    assert torch.equal(rope.frequencies, rotary(rope_scaling="yarn", rope_factor=2.0).frequencies)


on_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]


@pytest.mark.parametrize("head_dim", [32, 96, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=on_gpu)], ids=str)
def test_the_kernel_for_a_few_tokens_rotates_alike(dtype, head_dim):
    """Rounded once, of strided heads, for sequences at places of their own or at one."""
    triton = pytest.importorskip("kernels.backends.triton.rotate")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    draw = lambda *shape: torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape)))  # noqa: E731
    x = draw(2, 3, 5, 2 * head_dim).to(dtype)[..., head_dim:].transpose(1, 2)
    for batch in (1, 2):
        angle = 7 * draw(batch, 5, 1, head_dim // 2)
        cos, sin = angle.cos(), angle.sin()
        exact = rotate(x.double(), cos.double(), sin.double())
        found = triton.rotate(*(t.to(device) for t in (x, cos, sin))).cpu()
        assert found.dtype == dtype and found.shape == x.shape
        assert ((found.double() - exact).abs() <= torch.finfo(dtype).eps * (1 + exact.abs())).all()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_a_gpu_rotates_a_few_tokens_by_the_kernel_and_trains_without_it():
    x, angle = torch.randn(2, 1, 3, 64, device="cuda"), torch.randn(2, 1, 1, 32, device="cuda")
    trained = rotate(x.requires_grad_(), angle.cos(), angle.sin())
    with torch.no_grad():
        torch.testing.assert_close(rotate(x, angle.cos(), angle.sin()), trained, rtol=1e-6, atol=1e-6)
    trained.sum().backward()
    assert x.grad.abs().sum() > 0

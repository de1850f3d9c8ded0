"""Rotary embeddings by pattern: a base of its own, or none."""

import dataclasses

import pytest
import torch

from kernels.patterns import Dense, Window
from model import Transformer
from model.evaluation.replacement import with_plan
from model.rope import RotaryEmbedding
from tests.model.small import config, lively, plan

LENGTH, WIDTH, BASE = 40, 9, 300.0
PATTERNS = {"local": Window(WIDTH), "near": Window(WIDTH), "full": Dense()}
HYBRID = plan(PATTERNS, ["local", "near", "full"], rope={"near": BASE, "full": "none"})
ALL_ROTATED = dataclasses.replace(HYBRID, rope={})


def build(attention, **changes) -> Transformer:
    return lively(Transformer(config(layers=3, **changes), attention).double()).eval()


def tokens_of(length: int = LENGTH) -> torch.Tensor:
    return torch.randint(64, (2, length), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def logits(model: Transformer, tokens: torch.Tensor) -> torch.Tensor:
    position = torch.arange(tokens.shape[1]).expand(tokens.shape)
    return model.logits(model(tokens, position, model.build_layouts(None, tokens.shape[1])))


def normed(x: torch.Tensor, norm: torch.nn.Module) -> torch.Tensor:
    return x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * norm.weight


@torch.no_grad()
def reference(model: Transformer, tokens: torch.Tensor, layers: list[tuple[int, float | None]]) -> torch.Tensor:
    """The logits, computed from the weights alone, in float64. layers: (window, base) of each; None rotates nothing."""
    x, index = model.embed_tokens(tokens), torch.arange(tokens.shape[1], dtype=torch.float64)
    distance = index[:, None] - index
    for layer, (window, base) in zip(model.layers, layers, strict=True):
        attention, h = layer.self_attn, normed(x, layer.input_layernorm)
        q, k, v = (each(h).unflatten(-1, (-1, 8)) for each in (attention.q_proj, attention.k_proj, attention.v_proj))
        q, k = normed(q, attention.q_norm), normed(k, attention.k_norm)
        if base is not None:
            angle = index[:, None, None] * base ** -(torch.arange(4, dtype=torch.float64) / 4)
            turn = torch.polar(torch.ones_like(angle), angle)
            turned = (torch.complex(*each.chunk(2, -1)) * turn for each in (q, k))
            q, k = (torch.cat([each.real, each.imag], -1) for each in turned)
        k, v = (each.repeat_interleave(2, 2) for each in (k, v))
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / 8**0.5
        weights = scores.masked_fill((distance < 0) | (distance >= window), -torch.inf).softmax(-1)
        x = x + attention.o_proj(torch.einsum("bhqk,bkhd->bqhd", weights, v).flatten(2))
        h = normed(x, layer.post_attention_layernorm)
        mlp = layer.mlp
        x = x + mlp.down_proj(torch.nn.functional.silu(mlp.gate_proj(h)) * mlp.up_proj(h))
    return normed(x, model.norm) @ model.embed_tokens.weight.T


def test_a_hybrid_without_rotary_embeddings_in_dense_layers_equals_the_reference():
    """The tolerance is that of float32, in which queries and keys are rotated; everything else is float64."""
    model, tokens = build(HYBRID), tokens_of()
    expected = reference(model, tokens, [(WIDTH, 10000.0), (WIDTH, BASE), (LENGTH, None)])
    torch.testing.assert_close(logits(model, tokens), expected, rtol=0, atol=1e-5)
    for layers in ([10000.0, 10000.0, None], [10000.0, BASE, 10000.0]):
        other = reference(model, tokens, list(zip((WIDTH, WIDTH, LENGTH), layers, strict=True)))
        assert (other - expected).abs().max() > 1e-2


def test_a_base_of_its_own_is_not_scaled():
    """As the windows of Gemma 3, beside full layers with a scaling."""
    scaled = config(rope_scaling="yarn", rope_factor=4.0, rope_theta=1e6)
    own, plain = RotaryEmbedding(scaled, BASE), RotaryEmbedding(config(rope_theta=BASE))
    assert torch.equal(own.frequencies, plain.frequencies) and own.magnitude == 1


@pytest.mark.parametrize("scaling", ["none", "yarn", "dynamic"])
def test_a_layer_without_rotary_embeddings_uses_no_position(scaling):
    """The order of the earlier tokens changes the logits of the last token with rotary embeddings, not without."""
    tokens, scaled = tokens_of(), {"rope_scaling": scaling, "rope_factor": 1.0 if scaling == "none" else 2.0}
    order = torch.randperm(LENGTH - 1, generator=torch.Generator().manual_seed(1))
    permuted = torch.cat([tokens[:, order], tokens[:, -1:]], 1)
    for rope in ("none", "model"):
        model = lively(Transformer(config(layers=1, **scaled), plan(rope={"only": rope})).double()).eval()
        change = (logits(model, tokens) - logits(model, permuted))[:, -1].abs().max()
        assert change < 1e-6 if rope == "none" else change > 1e-2


def test_frequencies_of_a_model_built_on_meta_are_those_of_each_layer():
    with torch.device("meta"):
        model = Transformer(config(layers=3), HYBRID)
    model.to_empty(device="cpu")
    for built, expected in zip(model.rotaries, Transformer(config(layers=3), HYBRID).rotaries, strict=True):
        assert torch.equal(built.frequencies, expected.frequencies)


def test_layers_keep_their_rotary_embeddings_under_another_plan():
    model, tokens = build(HYBRID), tokens_of(WIDTH)  # windows see all of so few tokens
    torch.testing.assert_close(logits(with_plan(model, plan()), tokens), logits(model, tokens))
    assert (logits(build(ALL_ROTATED), tokens) - logits(model, tokens)).abs().max() > 1e-2
    with pytest.raises(ValueError, match="must not have rope=none"):
        with_plan(model, plan(rope={"only": "none"}))

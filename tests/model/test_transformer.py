"""The decoder: sizes, names, initial loss, learning, and what it says it costs."""

import math
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from torch.utils.flop_counter import FlopCounterMode

from kernels.patterns import Dense, Window
from model import ModelConfig, Transformer
from tests.kernels.oracle import Axis, brute_force_mask, packing
from tests.model.small import config, lively, plan, positions_of

PRESETS = Path(__file__).parents[2] / "configs" / "model"


def preset(name: str, vocabulary: int | None = None) -> ModelConfig:
    settings = OmegaConf.merge(OmegaConf.load(PRESETS / "base.yaml"), OmegaConf.load(PRESETS / f"{name}.yaml"))
    settings = OmegaConf.to_container(settings) | ({"vocabulary": vocabulary} if vocabulary else {})
    return ModelConfig(**{key: value for key, value in settings.items() if key not in ("defaults", "name")})


def random_batch(batch: int, length: int, vocabulary: int, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(vocabulary, (batch, length + 1), generator=generator)
    return tokens[:, :-1], tokens[:, 1:], torch.arange(length).expand(batch, length)


# Sizes and names


@pytest.mark.parametrize(
    "name, vocabulary, low, high",
    [
        ("nano", 4096, 1.0e6, 3e6),
        ("nano", 8192, 1.0e6, 3e6),
        ("tiny", 8192, 16.5e6, 17.5e6),
        ("small", 50304, 123e6, 125e6),
        ("medium", 50304, 345e6, 355e6),
        ("large", 50304, 1.27e9, 1.33e9),
    ],
)
def test_presets_have_the_parameters_that_they_promise(name, vocabulary, low, high):
    chosen = preset(name, None if vocabulary == 50304 else vocabulary)
    assert chosen.vocabulary == vocabulary and chosen.tie_embeddings
    with torch.device("meta"):
        model = Transformer(chosen, plan())
    attention = 2 * chosen.width * (chosen.heads + chosen.kv_heads) * chosen.head_dim
    layer = attention + 3 * chosen.width * chosen.mlp_width + 2 * chosen.width + 2 * chosen.head_dim
    assert model.parameter_count() == vocabulary * chosen.width + chosen.layers * layer + chosen.width
    assert low <= model.parameter_count() <= high


def test_every_preset_is_counted_above():
    presets = {path.stem for path in PRESETS.glob("*.yaml")} - {"base", "hf"}  # hf has the sizes of the model it reads
    assert presets == {"nano", "tiny", "small", "medium", "large"}


def test_names_and_shapes_are_those_of_the_qwen3_family():
    model = Transformer(config(layers=2, sink_logits=True, tie_embeddings=False), plan())
    layer = {
        "input_layernorm.weight": (16,),
        "self_attn.q_proj.weight": (32, 16),
        "self_attn.k_proj.weight": (16, 16),
        "self_attn.v_proj.weight": (16, 16),
        "self_attn.o_proj.weight": (16, 32),
        "self_attn.q_norm.weight": (8,),
        "self_attn.k_norm.weight": (8,),
        "self_attn.sink_logits": (4,),  # ours; Qwen3 has none
        "post_attention_layernorm.weight": (16,),
        "mlp.gate_proj.weight": (32, 16),
        "mlp.up_proj.weight": (32, 16),
        "mlp.down_proj.weight": (16, 32),
    }
    expected = {f"layers.{i}.{name}": shape for i in range(2) for name, shape in layer.items()}
    expected |= {"embed_tokens.weight": (64, 16), "norm.weight": (16,), "lm_head.weight": (64, 16)}
    assert {name: tuple(t.shape) for name, t in model.state_dict().items()} == expected


def test_tied_embeddings_are_one_parameter():
    tied, untied = (Transformer(config(tie_embeddings=tie), plan()) for tie in (True, False))
    assert tied.lm_head.weight is tied.embed_tokens.weight
    assert untied.parameter_count() - tied.parameter_count() == 64 * 16


def test_initialization_is_seeded_small_and_smaller_towards_the_residual_stream():
    def build(seed):
        torch.manual_seed(seed)
        return Transformer(config(width=64, mlp_width=256, layers=8), plan())

    model = build(1)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), build(1).parameters(), strict=True))
    assert not torch.equal(model.embed_tokens.weight, build(2).embed_tokens.weight)
    mlp = model.layers[3].mlp
    assert mlp.up_proj.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert mlp.down_proj.weight.std().item() == pytest.approx(0.02 / 4, rel=0.05)  # sqrt(2 * 8 layers)
    assert (model.norm.weight == 1).all()


# Loss and learning


@pytest.mark.parametrize("sinks", [False, True])
def test_loss_at_step_zero_is_that_of_a_uniform_guess(sinks):
    torch.manual_seed(0)
    chosen = preset("nano", vocabulary=4096)
    model = Transformer(ModelConfig(**(vars(chosen) | {"sink_logits": sinks})), plan(Window(32)))
    tokens, targets, position = random_batch(2, 96, 4096)
    loss = model.loss(tokens, targets, position, model.build_layouts(None, 96))
    assert loss.count == 192
    assert abs(loss.total.item() / 192 - math.log(4096)) < 0.3


@pytest.mark.slow  # 150 steps
def test_one_batch_is_overfitted_in_seconds():
    torch.manual_seed(0)
    patterns = {"local": Window(8, 1), "full": Dense()}
    model = Transformer(config(width=64, mlp_width=128, sink_logits=True), plan(patterns, ["local", ["local", "full"]]))
    batch = random_batch(2, 48, 64)
    layouts = model.build_layouts(None, 48)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(150):
        loss = model.loss(*batch, layouts)
        mean = loss.total / loss.count
        optimizer.zero_grad()
        mean.backward()
        optimizer.step()
    assert mean.item() < 0.1


def test_loss_is_the_cross_entropy_of_the_logits_and_zero_where_not_scored():
    model = lively(Transformer(config(), plan(Window(9))))
    tokens, targets, position = random_batch(2, 30, 64)
    targets = targets.clone()
    targets[0, :7], targets[1, -1] = -100, -100
    layouts = model.build_layouts(None, 30)
    loss = model.loss(tokens, targets, position, layouts)
    logits = model.logits(model(tokens, position, layouts))
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    torch.testing.assert_close(loss.per_token.flatten(), expected)
    torch.testing.assert_close(loss.total, expected.sum())
    assert loss.count == 60 - 8
    assert (loss.per_token[targets == -100] == 0).all()
    assert loss.total.requires_grad and not loss.per_token.requires_grad


def test_every_parameter_learns_sinks_included():
    model = lively(Transformer(config(sink_logits=True, tie_embeddings=False), plan(Window(9))))
    model.loss(*random_batch(1, 30, 64), model.build_layouts(None, 30)).total.backward()
    idle = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert not idle
    sinks = [layer.self_attn.sink_logits.grad for layer in model.layers]
    assert all((gradient.abs() > 1e-6).all() for gradient in sinks)


def test_sinks_take_weight_from_the_values():
    model = lively(Transformer(config(sink_logits=True, layers=1), plan()))
    tokens, _, position = random_batch(1, 20, 64)
    layouts = model.build_layouts(None, 20)
    with torch.no_grad():
        model.layers[0].self_attn.sink_logits.fill_(-1e4)
        without = model(tokens, position, layouts)
        plain = lively(Transformer(config(layers=1), plan()))
        plain.load_state_dict(model.state_dict(), strict=False)
        torch.testing.assert_close(without, plain(tokens, position, layouts))
        model.layers[0].self_attn.sink_logits.fill_(1e4)
        embedded = model.embed_tokens(tokens)
        nothing_attended = model.norm(
            embedded + model.layers[0].mlp(model.layers[0].post_attention_layernorm(embedded))
        )
        torch.testing.assert_close(model(tokens, position, layouts), nothing_attended)


def test_backends_give_the_same_model():
    hidden = []
    for backend in ("reference", "blocked"):
        model = lively(Transformer(config(), plan(Window(9), backend=backend)))
        tokens, _, position = random_batch(1, 50, 64)
        hidden.append(model(tokens, position, model.build_layouts(packing([20, 30]), 50)))
    torch.testing.assert_close(*hidden, rtol=0, atol=2e-5)


def test_bfloat16_autocast_is_close_to_float32():
    model = lively(Transformer(config(), plan(Window(9))))
    batch, layouts = random_batch(2, 40, 64), model.build_layouts(None, 40)
    exact = model.loss(*batch, layouts)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = model.loss(*batch, layouts)
    assert rounded.total.dtype == torch.float32
    assert abs(rounded.total - exact.total) < 0.02 * exact.total
    assert (rounded.per_token - exact.per_token).abs().max() > 1e-2, "nothing was rounded"


def test_a_model_built_on_meta_runs_once_it_has_memory():
    with torch.device("meta"):
        model = Transformer(config(), plan(Window(9)))
    model.to_empty(device="cpu")
    model.load_state_dict((source := lively(Transformer(config(), plan(Window(9))))).state_dict())
    tokens, _, position = random_batch(1, 20, 64)
    layouts = model.build_layouts(None, 20)
    assert torch.equal(model(tokens, position, layouts), source(tokens, position, layouts))


# Cost


@pytest.mark.parametrize("tie", [True, False])
def test_cost_is_what_one_counts_by_hand(tie):
    documents = packing([30, 20], [50, 0])
    model = Transformer(
        config(tie_embeddings=tie, layers=3), plan({"w": Window(5), "d": Dense()}, ["w", ["w", "d"], "d"])
    )
    cost = model.cost(model.build_layouts(documents, 50))
    axis = Axis.tokens(50, documents)
    window, dense = (int(brute_force_mask(p, axis).sum()) for p in (Window(5), Dense()))
    pairs = 4 * window + 2 * (window + dense) + 4 * dense  # 4 query heads, 2 to a KV head
    assert cost.attention.visible_pairs == pairs
    assert cost.attention.flops == 12 * 8 * pairs
    matrices = 64 * 16 + 3 * (2 * 16 * 32 + 2 * 16 * 16 + 3 * 16 * 32)  # the embedding is looked up, not multiplied
    assert cost.flops == 6 * matrices * 100 + cost.attention.flops
    causal = 3 * 4 * 2 * (50 * 51 // 2)
    assert cost.attention.causal_pairs == causal
    assert cost.dense_flops == 6 * matrices * 100 + 12 * 8 * causal


def test_cost_multiplies_shared_layouts_by_the_batch():
    model = Transformer(config(), plan(Window(5)))
    layouts = model.build_layouts(None, 40)
    one, three = model.cost(layouts), model.cost(layouts, batch=3)
    assert three.flops == 3 * one.flops and three.dense_flops == 3 * one.dense_flops
    assert three.attention.density_pairs == one.attention.density_pairs < 1


def test_cost_is_what_pytorch_counts_but_for_recomputed_scores():
    model = Transformer(config(), plan(Window(5)))
    layouts, batch = model.build_layouts(None, 40), random_batch(2, 40, 64)
    cost = model.cost(layouts, batch=2)
    with FlopCounterMode(display=False) as counter:
        model.loss(*batch, layouts).total.backward()
    assert counter.get_total_flops() == cost.flops + 2 * 8 * cost.attention.visible_pairs


def test_positions_helper_counts_within_documents():
    assert positions_of(packing([2, 3])).tolist() == [[0, 1, 0, 1, 2]]
